"""Failures that a client meets, each with its status in HTTP and gRPC."""

from __future__ import annotations

from http import HTTPStatus

from lmkan_deploy.errors import InputError, LmkanError


class ServingError(LmkanError):
    """Base of what the server answers with instead of outputs.

    Attributes:
        http_status: Status of an HTTP response.
        grpc_status: Name of a gRPC status code.
    """

    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    grpc_status = "INTERNAL"


class BadRequestError(ServingError, InputError):
    """The request can't be read, or does not fit the model."""

    http_status = HTTPStatus.BAD_REQUEST
    grpc_status = "INVALID_ARGUMENT"


class UnauthorizedError(ServingError):
    """The bearer token is missing or wrong."""

    http_status = HTTPStatus.UNAUTHORIZED
    grpc_status = "UNAUTHENTICATED"


class NotFoundError(ServingError):
    """There is no such model, version or page."""

    http_status = HTTPStatus.NOT_FOUND
    grpc_status = "NOT_FOUND"


class TooLargeError(ServingError):
    """The body is larger than the server takes."""

    http_status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    grpc_status = "RESOURCE_EXHAUSTED"


class UnsupportedError(ServingError):
    """The protocol has it, this server does not."""

    http_status = HTTPStatus.NOT_IMPLEMENTED
    grpc_status = "UNIMPLEMENTED"


class OverloadedError(ServingError):
    """The queue is full; the client should wait and try again."""

    http_status = HTTPStatus.TOO_MANY_REQUESTS
    grpc_status = "RESOURCE_EXHAUSTED"


class UnavailableError(ServingError):
    """The model is not loaded, or the server is shutting down."""

    http_status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_status = "UNAVAILABLE"


class DeadlineError(ServingError):
    """The answer did not come within the request's deadline."""

    http_status = HTTPStatus.GATEWAY_TIMEOUT
    grpc_status = "DEADLINE_EXCEEDED"


class BrokenModelError(ServingError):
    """A model could not run any more, and the server ended; no client meets this."""


def statuses(error: LmkanError) -> tuple[HTTPStatus, str]:
    """HTTP status and gRPC status name of an error."""
    if isinstance(error, ServingError):
        return error.http_status, error.grpc_status
    if isinstance(error, InputError):
        return BadRequestError.http_status, BadRequestError.grpc_status
    return ServingError.http_status, ServingError.grpc_status
