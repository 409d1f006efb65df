"""s3://, gs:// and az:// addresses: the store that is made of each, and what is said where one is of no use.

Nothing here talks to anyone: connections are made, and not used.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from activation_cache import StoreError, inspect
from activation_cache.store.base import LocalStore, open_store

pytest.importorskip("obstore")

from activation_cache.store.remote import ATTEMPTS, RemoteStore


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials from the machine that runs the tests."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("url", "kind", "options", "place"),
    [
        ("s3://bucket/some/prefix/", "S3Store", {"region": "eu-west-1"}, {"bucket": "bucket", "region": "eu-west-1"}),
        ("gs://bucket/some/prefix", "GCSStore", {"skip_signature": True}, {"bucket": "bucket"}),
        (
            "az://container/some/prefix",
            "AzureStore",
            {"account_name": "someone"},
            {"container_name": "container", "account_name": "someone"},
        ),
    ],
)
def test_an_address_makes_the_store_of_its_provider(
    tmp_path: Path, url: str, kind: str, options: dict[str, Any], place: dict[str, str]
) -> None:
    store = RemoteStore(url, folder=tmp_path, options=options)
    for one in (store, copy.copy(store)):  # a copy is made as a worker process gets one
        connection = one._connect()
        assert type(connection).__name__ == kind
        assert connection.prefix == "some/prefix"
        assert place.items() <= connection.config.items()
        assert connection.retry_config["max_retries"] == ATTEMPTS - 1
    assert store.location == url.rstrip("/")


def test_credentials_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore("az://container/prefix", folder=tmp_path)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "not one!")
    with pytest.raises(StoreError, match="Invalid Access Key"):
        store._connect()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aGVsbG8=")
    assert type(store._connect()).__name__ == "AzureStore"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("az://container/prefix", {}, r"Account must be specified; .*AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://container/p", {"account_name": "a", "account_key": "not one!"}, r"Invalid Access Key.*AZURE_STORAGE"),
        ("gs://bucket/p", {"service_account_path": "/not/there"}, r"/not/there.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://bucket/p", {"service_account_key": "{}"}, r"private_key.*GOOGLE_APPLICATION_CREDENTIALS"),
        ("ftp://host/prefix", {}, r"known are s3, gs, az"),
    ],
)
def test_an_address_of_no_use_says_what_it_lacks(
    tmp_path: Path, url: str, options: dict[str, Any], message: str
) -> None:
    store = RemoteStore(url, folder=tmp_path, options=options)
    with pytest.raises(StoreError, match=message) as caught:
        inspect(store)
    assert str(caught.value).startswith(f"{url} cannot be opened: ")
    assert "\n" not in str(caught.value)


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/cache")
    assert isinstance(store, LocalStore)
    assert store.root == tmp_path / "cache"
    assert isinstance(open_store("gs://bucket/prefix"), RemoteStore)
