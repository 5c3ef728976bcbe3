# The worker's image: the engine with torch, the background worker, and model conversion.
#     docker build --build-arg GIT_SHA=$(git rev-parse HEAD) -f ops/images/worker.Dockerfile -t headrace-worker .
# On x86-64 torch comes as the CUDA build, which runs on a CPU too. For a smaller image name an index
# that has CPU builds: --build-arg PIP_EXTRA_INDEX_URL=…
FROM python:3.11-slim AS build
# The compiler of the engine's kernels; on other processors than x86-64 they are left out.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL=
RUN python -m venv /opt/headrace
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/headrace/bin/pip install --disable-pip-version-check -c constraints.txt '.[worker,gpu]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home headrace \
    && install -d -o headrace -g headrace /var/lib/headrace /var/lib/headrace-files
COPY --from=build /opt/headrace /opt/headrace
ARG GIT_SHA=""
ENV HEADRACE_GIT_SHA=$GIT_SHA
ENV PATH=/opt/headrace/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HEADRACE_DATA_DIR=/var/lib/headrace
USER headrace
WORKDIR /var/lib/headrace
VOLUME /var/lib/headrace /var/lib/headrace-files
ENTRYPOINT ["headrace"]
CMD ["worker"]
