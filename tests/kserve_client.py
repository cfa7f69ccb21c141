"""Asks a server with KServe's own client; run by test_server.py in an environment that has it.

Usage: kserve_client.py URL GRPC_ADDRESS MODEL X.npy Y.npy

Y is what the model answers to X, float32 within 1e-6.
"""

from __future__ import annotations

import asyncio
import sys

import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def request(model: str, x: np.ndarray, *, binary: bool) -> InferRequest:
    """A request for the output y, both tensors as numbers or as bytes."""
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    output = RequestedOutput("y", parameters={"binary_data": binary})
    return InferRequest(model_name=model, infer_inputs=[tensor], request_id="seven", request_outputs=[output])


async def main() -> None:
    """Command line."""
    url, grpc_address, model = sys.argv[1:4]
    x, y = np.load(sys.argv[4]), np.load(sys.argv[5])
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, model)
    for binary in (False, True):
        answer = await client.infer(url, request(model, x, binary=binary), model_name=model)
        assert (answer.id, answer.model_name) == ("seven", model)
        np.testing.assert_allclose(answer.outputs[0].as_numpy(), y, rtol=1e-6, atol=1e-6)
    refusal = None
    try:
        await client.infer(url, request(model, x[:, :1], binary=False), model_name=model)
    except httpx.HTTPStatusError as error:
        refusal = error
    assert refusal is not None
    assert refusal.response.status_code == 400
    assert "expected input x" in str(refusal)
    grpc_client = InferenceGRPCClient(grpc_address)
    assert await grpc_client.is_model_ready(model)
    answer = await grpc_client.infer(request(model, x, binary=True))
    np.testing.assert_allclose(answer.outputs[0].as_numpy(), y, rtol=1e-6, atol=1e-6)
    print("ok")


if __name__ == "__main__":
    asyncio.run(main())
