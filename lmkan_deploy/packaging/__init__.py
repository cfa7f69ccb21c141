"""Folders that a model is deployed from: repositories for Triton, manifests for KServe, applications for Ray."""

from __future__ import annotations

from lmkan_deploy.packaging.package import FormatName, PackageResult, package_model
from lmkan_deploy.packaging.source import PackageError

__all__ = ["FormatName", "PackageError", "PackageResult", "package_model"]
