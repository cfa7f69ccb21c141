"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
import torch

import lmkan_deploy
from networks import USER_MODELS, ExportedStack, UserModel, make_stack


@pytest.fixture(params=USER_MODELS, ids=lambda model: model.name)
def user_model(request: pytest.FixtureRequest) -> UserModel:
    return request.param


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> ExportedStack:
    folder = tmp_path_factory.mktemp("stack")
    module = make_stack(10, 24, 7)
    torch.save(module.state_dict(), folder / "model.pt")
    lmkan_deploy.export(folder / "model.pt", folder / "model.onnx")
    return ExportedStack(module, folder / "model.pt", folder / "model.onnx")
