from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from talkoot.protocol.errors import IntegrityError, StateError
from talkoot.protocol.identity import (
    NodeKey,
    fingerprint,
    load_certificate,
    load_public_key,
    make_csr,
    node_id_of,
    verify,
)
from talkoot.protocol.messages import Refusal, Signed, Verdict, canonical_bytes

KEY = NodeKey.generate()
OTHER = NodeKey.generate()
MESSAGE = Refusal(code="late", sentence="The round is closed – päätetty.")


SIGNED = KEY.sign("Refusal", canonical_bytes(MESSAGE))


def certificate(key: NodeKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key)
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key.private_key, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )


def test_what_a_key_signs_is_read_back_with_its_public_half() -> None:
    travelled = Signed.model_validate_json(canonical_bytes(SIGNED))
    assert verify(travelled, "Refusal", load_public_key(KEY.public_pem), Refusal) == MESSAGE


def test_another_key_does_not_verify() -> None:
    with pytest.raises(IntegrityError, match="signature"):
        verify(SIGNED, "Refusal", OTHER.public_key, Refusal)


def test_a_message_signed_as_one_kind_cannot_be_shown_as_another() -> None:
    with pytest.raises(IntegrityError, match="expected"):
        verify(SIGNED, "Verdict", KEY.public_key, Verdict)
    renamed = SIGNED.model_copy(update={"kind": "Verdict"})
    with pytest.raises(IntegrityError, match="signature"):
        verify(renamed, "Verdict", KEY.public_key, Refusal)


def test_the_boundary_between_kind_and_body_cannot_be_moved() -> None:
    with pytest.raises(ValueError, match="kind"):
        KEY.sign("Refusal\x00{}", b"{}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_character_of_body_or_signature_survives(data: st.DataObject) -> None:
    original = SIGNED
    field = data.draw(st.sampled_from(["body", "signature"]))
    text: str = getattr(original, field)
    at = data.draw(st.integers(0, len(text) - 1))
    alphabet = "0123456789abcdef" if field == "signature" else 'abc{}" 01é'
    new = data.draw(st.sampled_from(alphabet).filter(lambda char: char != text[at]))
    changed = original.model_copy(update={field: text[:at] + new + text[at + 1 :]})
    with pytest.raises(IntegrityError):
        verify(changed, "Refusal", KEY.public_key, Refusal)


@pytest.mark.parametrize(
    "body",
    [
        b'{"sentence":"x","code":"late"}',
        b'{"code": "late","sentence":"x"}',
        b'{"code":"late","sentence":"\\u0078"}',
        b'{"code":"late","code":"late","sentence":"x"}',
    ],
)
def test_a_signed_body_in_any_other_spelling_is_refused(body: bytes) -> None:
    with pytest.raises(IntegrityError, match="canonical"):
        verify(KEY.sign("Refusal", body), "Refusal", KEY.public_key, Refusal)


def test_a_signed_body_that_is_no_such_message_is_refused() -> None:
    with pytest.raises(IntegrityError, match="not valid"):
        verify(KEY.sign("Refusal", b'{"code":1}'), "Refusal", KEY.public_key, Refusal)


def test_a_saved_key_is_private_and_comes_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "node-key.pem"
    KEY.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = NodeKey.load(path)
    assert loaded.node_id == KEY.node_id == node_id_of(KEY.public_key)
    assert loaded.public_pem == KEY.public_pem
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_file_that_is_missing_damaged_or_huge_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "node-key.pem"
    with pytest.raises(StateError, match="does not exist"):
        NodeKey.load(path)
    path.write_bytes(KEY.private_pem()[:100])
    with pytest.raises(StateError, match="not a usable key"):
        NodeKey.load(path)
    path.write_bytes(b"x" * 1_000_000)
    with pytest.raises(StateError, match="longer than"):
        NodeKey.load(path)


def test_only_p384_keys_are_taken() -> None:
    for key in (
        ec.generate_private_key(ec.SECP256R1()),
        rsa.generate_private_key(65537, 2048),
    ):
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        with pytest.raises(IntegrityError):
            NodeKey.from_pem(pem)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with pytest.raises(IntegrityError):
            load_public_key(public)


def test_a_public_key_has_one_spelling() -> None:
    for other in (b"\n" + KEY.public_pem, KEY.public_pem + b"\n", KEY.public_pem[:-1], b""):
        with pytest.raises(IntegrityError):
            load_public_key(other)


def test_the_private_key_is_not_in_the_representation() -> None:
    assert repr(KEY) == f"NodeKey(node_id='{KEY.node_id}')"


def test_a_request_carries_the_key_and_proves_possession() -> None:
    request = x509.load_pem_x509_csr(make_csr(KEY, KEY.node_id))
    assert request.is_signature_valid
    assert request.public_key() == KEY.public_key


def test_a_fingerprint_is_of_exactly_one_certificate() -> None:
    first, second = certificate(KEY), certificate(OTHER)
    digest = load_certificate(first).fingerprint(hashes.SHA256()).hex()
    assert fingerprint(first) == digest
    for pem in (first + second, b"", b"-----BEGIN CERTIFICATE-----\n", first * 20):
        with pytest.raises(IntegrityError, match="exactly one"):
            fingerprint(pem)
