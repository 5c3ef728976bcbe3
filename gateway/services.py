"""What a request handler can reach: the parts of one gateway process, joined in ``app.py``."""

import os
import socket
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from starlette.requests import Request

from common.broker import BatchWatch, Broker, GatewayPresence
from common.clock import monotonic_s
from common.files import Files
from common.metrics import GatewayMetrics
from common.models.adapters import AdapterStore
from common.models.chat_template import ChatTemplate
from common.models.store import ModelStore
from common.models.tokenizer import Tokenizer
from common.settings import GatewaySettings, OrderSettings, Settings
from common.spans import Spans
from common.storage import Storage
from gateway.admission import Admissions
from gateway.callers import Callers
from gateway.relay import Relay
from gateway.stream_tokens import StreamTokens
from gateway.uploads import UploadPlaces


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of this gateway: what a gateway needs of it, which is no weights."""

    name: str
    version: str
    max_total_tokens: int
    """Longest prompt plus answer: the model's own limit or the operator's, whichever is lower."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    dtype: str = ""
    created: int = 0
    """When it was put into the store, in seconds."""
    adapters: AdapterStore = field(default_factory=AdapterStore)
    """Looks again whenever the store has changed: ``resolve(name).version`` is what goes into
    :attr:`gateway.order.Order.adapter`, ``list()`` what there is."""


class Offer(Protocol):
    """What an order is made of and checked against: by a gateway, and for the lines of a batch."""

    @property
    def model(self) -> ServedModel: ...
    @property
    def settings(self) -> OrderSettings: ...
    @property
    def max_input_tokens(self) -> int: ...


@dataclass(slots=True)
class Services:
    name: str
    """This gateway incarnation's name in Redis."""
    settings: GatewaySettings
    model: ServedModel
    broker: Broker
    relay: Relay
    callers: Callers
    stream_tokens: StreamTokens
    storage: Storage
    files: Files
    batch_watch: BatchWatch
    """Tells who follows a batch when it changes."""
    admissions: Admissions
    metrics: GatewayMetrics
    version: str
    """Of the product."""
    upload_places: UploadPlaces = field(default_factory=UploadPlaces)
    num_followers: int = 0
    """Who reads the feed of the live page here."""
    began_s: float = field(default_factory=monotonic_s)
    spans: Spans | None = None
    """None: nobody collects them."""
    is_draining: bool = False
    """SIGTERM came: no new generations; what is open goes on."""

    def presence(self) -> GatewayPresence:
        """What this gateway says of itself in its beats."""
        return GatewayPresence(
            model_version=self.model.version,
            state="draining" if self.is_draining else "ready",
            pid=os.getpid(),
            host=socket.gethostname(),
            streams=self.relay.num_streams,
            up_s=round(monotonic_s() - self.began_s, 3),
            figures=self.metrics.tally.figures,
        )

    @property
    def max_input_tokens(self) -> int:
        return longest_prompt(self.model, self.settings)


def longest_prompt(model: ServedModel, settings: OrderSettings) -> int:
    """In tokens: one less than what it makes with its answer, or the operator's limit."""
    longest = model.max_total_tokens - 1
    return min(settings.max_input_tokens or longest, longest)


def load_model(settings: Settings) -> ServedModel:
    """What a gateway needs of the model in the store.

    Raises: Failure MODEL_NOT_FOUND, MODEL_LOAD_FAILED.
    """
    stored = ModelStore(settings.data_dir).get(settings.model)
    manifest = stored.manifest
    return ServedModel(
        name=manifest.name,
        version=manifest.version,
        max_total_tokens=min(settings.max_total_tokens, manifest.max_position_embeddings),
        tokenizer=Tokenizer.load(stored.path),
        chat_template=ChatTemplate.load(stored.path),
        dtype=manifest.dtype,
        created=int(datetime.fromisoformat(manifest.created).timestamp()),
        adapters=AdapterStore.beside(settings.data_dir, manifest.name),
    )


def services_of(request: Request) -> Services:
    return request.app.state.services
