# The gateway's image: HTTP, tokenizers and Redis. No torch.
#     docker build --build-arg GIT_SHA=$(git rev-parse HEAD) -f ops/images/gateway.Dockerfile -t headrace-gateway .
FROM python:3.11-slim AS build
RUN python -m venv /opt/headrace
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/headrace/bin/pip install --disable-pip-version-check -c constraints.txt .
RUN ! /opt/headrace/bin/python -c 'import torch' 2>/dev/null

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home headrace \
    && install -d -o headrace -g headrace /var/lib/headrace /var/lib/headrace-files
COPY --from=build /opt/headrace /opt/headrace
ARG GIT_SHA=""
ENV HEADRACE_GIT_SHA=$GIT_SHA
ENV PATH=/opt/headrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HEADRACE_DATA_DIR=/var/lib/headrace HEADRACE_HOST=0.0.0.0 HEADRACE_PORT=8080
USER headrace
WORKDIR /var/lib/headrace
VOLUME /var/lib/headrace /var/lib/headrace-files
EXPOSE 8080
ENTRYPOINT ["headrace"]
CMD ["gateway"]
