"""What every part of one server process shares."""

from __future__ import annotations

import hmac
import itertools
import os
from dataclasses import dataclass, field

from lmkan_deploy.serving.control import Control
from lmkan_deploy.serving.errors import UnauthorizedError
from lmkan_deploy.serving.metrics import Metrics
from lmkan_deploy.serving.models import ModelStore
from lmkan_deploy.serving.patience import Patience

SERVER_NAME = "lmkan-deploy"

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
"""Extensions of the protocol that this server has, by their published names."""


@dataclass
class Context:
    """State and limits of one server process.

    Attributes:
        store: The models.
        control: Carries loads and unloads to the other processes of the server.
        metrics: What the process counts.
        token: What clients must present; None for no check.
        max_body: Most bytes of a request's body.
        body_timeout: Seconds within which a body must arrive.
        timeout: Seconds that a request may take unless it says less; None for any.
        log_requests: Whether every request is logged.
        draining: Whether the server is shutting down: it answers what it has and takes no new connections.
        patience: Ends what takes too long.
    """

    store: ModelStore
    control: Control
    metrics: Metrics
    token: str | None
    max_body: int
    body_timeout: float
    timeout: float | None
    log_requests: bool
    draining: bool = False
    patience: Patience = field(default_factory=Patience)
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _prefix: str = field(default_factory=lambda: os.urandom(6).hex())

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send requests."""
        return not self.draining and self.store.ready

    def new_id(self) -> str:
        """An identifier of a request, unique over processes and restarts."""
        return f"{self._prefix}-{next(self._ids):x}"

    def limit(self, timeout: float | None) -> float | None:
        """The smaller of a request's own timeout and the server's."""
        if timeout is None or self.timeout is None:
            return self.timeout if timeout is None else timeout
        return min(timeout, self.timeout)

    def authorize(self, header: str | None) -> None:
        """Checks an Authorization header.

        Raises:
            UnauthorizedError: It does not present the token.
        """
        if self.token is None:
            return
        expected = f"Bearer {self.token}".encode()
        if header is None or not hmac.compare_digest(header.encode(), expected):
            found = "none" if header is None else "another"
            raise UnauthorizedError(f"expected the header 'Authorization: Bearer TOKEN', found {found}")
