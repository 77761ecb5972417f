import json

import pytest

from hone_trainer.scrub import Scrubber, is_secret, without_secrets

ENVIRONMENT = {
    "HF_TOKEN": "canary-hub-token",
    "AWS_ACCESS_KEY_ID": "canary-key-id",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+key",
    "AWS_SESSION_TOKEN": "canary-session",
    "HTTPS_PROXY": "http://someone:canary%20proxy@proxy.example:3128",
    "PIP_INDEX_URL": "https://canary-lonely@index.example/simple",
    "WANDB_API_KEY": "canary-wandb",
    "HOME": "/work/home",
    "TOKENIZERS_PARALLELISM": "canaries",
    "HF_TOKEN_PATH": "/work/hub/token",
    "AWS_SHARED_CREDENTIALS_FILE": "/work/aws",
    "HONE_REPORT_TOKEN_FILE": "/var/run/secrets/hone/token",
}
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEcanary\nMIIEcanary\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "text",
    [
        "GET https://hub.example/model?token=canary-hub-token failed",
        "the secret is canary/secret+key",
        "signed with canary%2Fsecret%2Bkey",
        "proxy http://someone:canary%20proxy@proxy.example:3128 refused",
        "the password canary proxy was refused",
        "https://canary-lonely@index.example/simple",
        "https://other:canary-unknown@elsewhere.example",
        "canary-session canary-wandb",
        f"key {KEY}",
        "bearer eyJhbGciOiJSUzI1NiIsImtpZCI6.eyJhdWQiOlsiaG9uZS1yZXBvcnQiX.canarycanarycanary",
        "hf_canarycanarycanarycanary",
    ],
)
def test_no_secret_is_left_in_a_text(text: str) -> None:
    scrubbed = Scrubber(ENVIRONMENT).text(text)
    assert "canary" not in scrubbed
    assert "***" in scrubbed


def test_two_access_keys_can_still_be_told_apart() -> None:
    assert (
        Scrubber(ENVIRONMENT).text("does not know access key 'canary-key-id'") == "does not know access key 'cana***'"
    )


@pytest.mark.parametrize(
    "text",
    [
        "model.source: hf://gpt2@main and hf://org/name@607a30d",
        "s3://bucket/prefix is full",
        "mail someone@example.org",
        "loss 1.2 at step 3 in /work/home",
        "true",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Scrubber({**ENVIRONMENT, "DEBUG_TOKEN": "true"}).text(text) == text


def test_records_are_scrubbed_all_through_and_stay_json() -> None:
    record = {"a": ["canary-hub-token", {"b": KEY}], "n": 1, "none": None}
    assert json.loads(json.dumps(Scrubber(ENVIRONMENT).value(record))) == {
        "a": ["***", {"b": "***"}],
        "n": 1,
        "none": None,
    }


def test_workers_are_not_handed_secrets() -> None:
    assert without_secrets(ENVIRONMENT).keys() == {
        "HOME",
        "TOKENIZERS_PARALLELISM",
        "HF_TOKEN_PATH",
        "AWS_SHARED_CREDENTIALS_FILE",
        "HONE_REPORT_TOKEN_FILE",
    }


def test_names_are_known_whatever_their_case() -> None:
    assert is_secret("hf_token") and is_secret("DB_PASSWORD") and is_secret("HUGGING_FACE_HUB_TOKEN")
    assert not is_secret("TOKENIZERS_PARALLELISM") and not is_secret("AUTHOR") and not is_secret("HF_TOKEN_PATH")
