"""Keys, requests, certificates and kits: made, checked, renewed and refused, without any process."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import pickle
import shutil
import stat
import tarfile
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

from fedprllm import ConfigError
from fedprllm.cli.app import app
from fedprllm.errors import FedprllmError, RunError
from fedprllm.federation.flare.kits import keys_of_participants, write_kits, write_ready_kits
from fedprllm.federation.flare.processes import start_participant, start_server
from fedprllm.federation.keys import authority as authorities
from fedprllm.federation.keys import certificates, requests, revoked
from fedprllm.federation.keys.identity import accept, check_credentials, examine, new_identity, renew
from fedprllm.federation.plan import Plan
from fedprllm.files import read_json, write_json
from tests.private_keys import private_keys

NAMES = ["north", "south"]


@pytest.fixture(scope="module")
def keys():
    """Keys take long to draw, so the tests share them."""
    return [certificates.new_key() for _ in range(3)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, keys):
    """Kits of a federation, written once."""
    folder = tmp_path_factory.mktemp("drawn")
    write_kits(make_plan(), folder)
    return folder


def make_plan(**options):
    return Plan(server="localhost", port=8002, participants=NAMES, **options)


@pytest.fixture
def kits(drawn, tmp_path):
    return Path(shutil.copytree(drawn, tmp_path / "kits"))


@pytest.fixture
def quick_keys(monkeypatch, keys):
    """Draw the shared keys, one after the other, instead of new ones."""
    from fedprllm.federation.keys import identity

    left = list(keys)
    monkeypatch.setattr(identity, "new_key", lambda: left.pop(0))


@pytest.fixture
def joined(kits, tmp_path, quick_keys):
    """A participant that has accepted its kit."""
    folder = tmp_path / "north"
    sign(kits, new_identity("north", folder).path)
    accept(folder, examine(folder, kits / "north.kit"))
    return folder


def sign(kits, path, **options):
    return authorities.sign(kits, make_plan(**options), requests.read_request(path))


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


# Requests --------------------------------------------------------------------------------------


def test_a_new_identity_is_a_key_for_its_owner_only_and_a_request_without_secrets(tmp_path, quick_keys):
    folder = tmp_path / "north"
    request = new_identity("north", folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"startup/client.key", "north.csr"}
    assert stat.S_IMODE((folder / "startup" / "client.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "startup").stat().st_mode) == 0o700
    assert private_keys(folder) == {"startup/client.key"}
    read = requests.read_request(request.path)
    assert read.name == "north"
    assert certificates.fingerprint(read.public_key) == request.fingerprint


def test_asking_again_before_the_answer_keeps_the_key(tmp_path, quick_keys):
    first = new_identity("north", tmp_path / "north")
    assert new_identity("north", tmp_path / "north").fingerprint == first.fingerprint
    with pytest.raises(RunError, match="open request of 'north'"):
        new_identity("south", tmp_path / "north")


@pytest.mark.parametrize("name", ["server", "admin", "North", "a b", "../x", "", "-a", "coordinator"])
def test_a_name_is_one_of_a_participant(name, tmp_path):
    with pytest.raises(ConfigError, match="cannot name"):
        new_identity(name, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_fingerprint_is_what_other_tools_compute(keys):
    der = (
        keys[0]
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    found = certificates.fingerprint(keys[0].public_key())
    assert found.replace(" ", "") == digest.finalize().hex()[:32]
    assert [len(group) for group in found.split()] == [4] * 8
    assert certificates.same_fingerprint(found, found.replace(" ", "").upper())
    assert certificates.same_fingerprint(found, found.replace(" ", ":"))
    assert not certificates.same_fingerprint(found, found[:-1])
    assert not certificates.same_fingerprint(found, certificates.fingerprint(keys[1].public_key()))


def named(*parts):
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])


COMMON = (NameOID.COMMON_NAME, "north")


def built(key, subject=None, extensions=(), attributes=(), algorithm=None):
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        named(COMMON) if subject is None else subject
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    for oid, value in attributes:
        builder = builder.add_attribute(oid, value)
    if algorithm is None and not isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def weak(bits, exponent=65537):
    return rsa.generate_private_key(public_exponent=exponent, key_size=bits)


BAD_REQUESTS = {
    "role super": (
        lambda key: built(key, named(COMMON, (NameOID.UNSTRUCTURED_NAME, "super"))),
        "nothing else",
    ),
    "any role": (
        lambda key: built(key, named(COMMON, (NameOID.UNSTRUCTURED_NAME, "project_admin"))),
        "nothing else",
    ),
    "an organization": (
        lambda key: built(key, named(COMMON, (NameOID.ORGANIZATION_NAME, "fedprllm"))),
        "nothing else",
    ),
    "two names": (lambda key: built(key, named(COMMON, (NameOID.COMMON_NAME, "south"))), "nothing else"),
    "no name": (lambda key: built(key, x509.Name([])), "no name"),
    "an authority": (
        lambda key: built(key, extensions=[x509.BasicConstraints(ca=True, path_length=None)]),
        "basicConstraints",
    ),
    "the server's host": (
        lambda key: built(key, extensions=[x509.SubjectAlternativeName([x509.DNSName("localhost")])]),
        "subjectAltName",
    ),
    "a usage": (
        lambda key: built(key, extensions=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])]),
        "extendedKeyUsage",
    ),
    "a password": (
        lambda key: built(key, attributes=[(x509.oid.AttributeOID.CHALLENGE_PASSWORD, b"secret")]),
        "an attribute",
    ),
    "a short key": (lambda key: built(weak(2048)), "2048 bits"),
    "an elliptic curve": (lambda key: built(ec.generate_private_key(ec.SECP256R1())), "expected an RSA key"),
    "an Edwards curve": (lambda key: built(ed25519.Ed25519PrivateKey.generate()), "expected an RSA key"),
    "a small exponent": (lambda key: built(weak(3072, 3)), "exponent 3"),
    "nothing": (lambda key: b"", "is not a certificate request"),
    "garbage": (
        lambda key: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        "is not a readable certificate request",
    ),
    "two requests": (lambda key: built(key) * 2, "is not a certificate request"),
    "binary": (lambda key: bytes(range(256)) * 8, "is not a certificate request"),
    "too long": (lambda key: built(key) + b"\n" * 100_000, "longer than"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_is_for_a_name_and_nothing_else(case, keys, tmp_path):
    make, message = BAD_REQUESTS[case]
    (tmp_path / "north.csr").write_bytes(make(keys[0]))
    with pytest.raises(ConfigError, match=message):
        requests.read_request(tmp_path / "north.csr")


def test_a_request_proves_that_its_sender_holds_the_key(keys, tmp_path):
    """Somebody else's public key, without its private one: the signature is of another key."""
    path = tmp_path / "north.csr"
    honest, forger = (x509.load_pem_x509_csr(requests.make_request(key, "north")) for key in keys[:2])
    der = honest.public_bytes(serialization.Encoding.DER)
    assert honest.signature in der
    forged = der.replace(honest.signature, forger.signature)
    text = base64.encodebytes(forged).decode()
    path.write_text(f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n")
    with pytest.raises(ConfigError, match="may not hold the private key"):
        requests.read_request(path)
    altered = der.replace(b"north", b"south")
    text = base64.encodebytes(altered).decode()
    path.write_text(f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n")
    with pytest.raises(ConfigError, match="may not hold the private key"):
        requests.read_request(path)


def test_a_private_key_that_was_sent_by_mistake_is_recognized(tmp_path, keys):
    certificates.write_key(tmp_path / "north.csr", keys[0])
    with pytest.raises(ConfigError, match="holds a private key, which must never leave"):
        requests.read_request(tmp_path / "north.csr")


# Signing ---------------------------------------------------------------------------------------


def test_a_kit_holds_an_address_and_two_certificates(kits, joined):
    kit = read_json(kits / "north.kit")
    assert set(kit) == {
        "format", "name", "federation", "target", "scheme", "server", "certificate", "authority",
    }  # fmt: skip
    certificate = x509.load_pem_x509_certificate(kit["certificate"].encode())
    assert certificate.subject == named(COMMON, (NameOID.ORGANIZATION_NAME, "fedprllm"))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    root = x509.load_pem_x509_certificate(kit["authority"].encode())
    assert root.not_valid_after_utc > certificate.not_valid_after_utc + timedelta(days=3000)
    files = {path.relative_to(joined).as_posix() for path in joined.rglob("*") if path.is_file()}
    assert files == {
        f"startup/{name}" for name in ("client.crt", "client.key", "rootCA.pem", "fed_client.json")
    }
    assert check_credentials(joined) == pytest.approx(360, abs=1)


def test_kits_and_authority_hold_no_key_of_a_participant(kits, joined):
    assert private_keys(kits) == {
        ".authority/root.key",
        "admin/startup/client.key",
        "server/startup/server.key",
    }
    assert stat.S_IMODE((kits / ".authority" / "root.key").stat().st_mode) == 0o600
    assert not keys_of_participants(make_plan(), kits)


HIDDEN = {
    "PEM": lambda pem, der: pem,
    "DER": lambda pem, der: b"before" + der + b"after",
    "JSON": lambda pem, der: json.dumps({"pri_key": pem.decode()}).encode(),
    "base64": lambda pem, der: b'{"key": "' + base64.b64encode(der) + b'"}',
    "wrapped base64": lambda pem, der: json.dumps(base64.encodebytes(der).decode()).encode(),
    "hex": lambda pem, der: der.hex().encode(),
    "pickle": lambda pem, der: pickle.dumps({"state": [der]}),
    "gzip": lambda pem, der: gzip.compress(pem),
}


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/x", content)
    return buffer.getvalue()


def tarred(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("x")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("archive", [lambda content: content, zipped, tarred], ids=["plain", "zip", "tar"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_the_search_for_private_keys_finds_them(kind, archive, keys, tmp_path):
    formats = serialization.PrivateFormat
    pem = keys[0].private_bytes(
        serialization.Encoding.PEM, formats.TraditionalOpenSSL, serialization.NoEncryption()
    )
    der = keys[0].private_bytes(serialization.Encoding.DER, formats.PKCS8, serialization.NoEncryption())
    (tmp_path / "file").write_bytes(archive(HIDDEN[kind](pem, der)))
    assert private_keys(tmp_path)


def test_only_participants_of_the_plan_get_certificates(kits, keys, tmp_path):
    for name, message in (("nroth", "did you mean 'north'"), ("localhost", "Only participants")):
        (tmp_path / "x.csr").write_bytes(requests.make_request(keys[0], name))
        with pytest.raises(ConfigError, match=message):
            sign(kits, tmp_path / "x.csr")
    assert not list(kits.glob("*.kit"))


def test_two_participants_never_have_the_same_key(kits, joined, keys, tmp_path):
    (tmp_path / "south.csr").write_bytes(requests.make_request(keys[0], "south"))
    with pytest.raises(ConfigError, match="has the key of 'north'"):
        sign(kits, tmp_path / "south.csr")


def test_signing_asks_for_the_fingerprint(kits, tmp_path, quick_keys):
    request = new_identity("north", tmp_path / "north")
    words = ["federation", "sign", request.path, "--kits", kits]
    for more, message in (([], "no terminal"), (["--fingerprint", "0000 " * 8], "you were told")):
        result = run(*words, *more)
        assert message in str(result.exception), result.output
        assert not (kits / "north.kit").exists()
    result = run(*words, "--fingerprint", request.fingerprint.upper())
    assert result.exit_code == 0, result.output
    root = authorities.authority_fingerprint(authorities.authority(kits))
    assert request.fingerprint in result.output
    assert root in result.output  # what the participant compares
    words = ["identity", "accept", tmp_path / "north", kits / "north.kit"]
    for more, message in (([], "no terminal"), (["--fingerprint", request.fingerprint], "you were told")):
        result = run(*words, *more)
        assert message in str(result.exception), result.output
        assert not (tmp_path / "north" / "startup" / "client.crt").exists()
    assert run(*words, "--fingerprint", root).exit_code == 0
    # The same key again needs no comparison, nor does the same authority.
    renew(tmp_path / "north")
    assert "same key as before" in run("federation", "sign", request.path, "--kits", kits).output
    assert run(*words).exit_code == 0


# Accepting -------------------------------------------------------------------------------------


def altered(kits, **changes):
    kit = read_json(kits / "north.kit")
    write_json(kits / "altered.kit", {**kit, **changes})
    return kits / "altered.kit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "localhost:80 --set x=1"}, "target cannot be"),
        ({"scheme": "file"}, "scheme cannot be"),
        ({"federation": "server"}, "federation cannot be"),
        ({"name": "south"}, "kit of 'south'"),
        ({"extra": 1}, "unknown option 'extra'"),
        ({"target": 5}, "target"),
        ({"format": "fedprllm kit 2"}, "is not a participant's kit"),
        ({"certificate": "no"}, "does not hold exactly one certificate"),
        ({"server": "-----BEGIN PRIVATE KEY-----"}, "contains a private key"),
    ],
)
def test_an_altered_kit_is_refused_before_anything_is_written(changes, message, kits, tmp_path, quick_keys):
    folder = tmp_path / "north"
    sign(kits, new_identity("north", folder).path)
    with pytest.raises(FedprllmError, match=message):
        examine(folder, altered(kits, **changes))
    assert not (folder / "startup" / "client.crt").exists()


def test_certificates_of_a_kit_fit_each_other_and_the_key(kits, keys, tmp_path, quick_keys):
    folder = tmp_path / "north"
    sign(kits, new_identity("north", folder).path)
    root = authorities.authority(kits)
    stranger = certificates.make_root("fedprllm", 10)
    public = keys[0].public_key()
    past = datetime.now(UTC) - timedelta(days=30)
    cases = {
        "did not sign": {"authority": certificates.pem(stranger.certificate)},
        "certifies the key": {
            "certificate": certificates.pem(certificates.issue(root, "north", keys[1].public_key(), 9))
        },
        "kit of 'south'": {"certificate": certificates.pem(certificates.issue(root, "south", public, 9))},
        "expired on": {
            "certificate": certificates.pem(certificates.issue(root, "north", public, 9, begin=past))
        },
    }
    for message, changes in cases.items():
        with pytest.raises(RunError, match=message):
            examine(folder, altered(kits, **changes))


def test_another_authority_is_not_accepted_by_an_identity_that_has_one(kits, joined, tmp_path):
    other = tmp_path / "other"
    write_kits(make_plan(), other)
    sign(other, renew(joined).path)
    with pytest.raises(RunError, match="comes from another authority"):
        examine(joined, other / "north.kit")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"PK\x03\x04", b'{"format": 1}', b"[" * 60_000, b" " * 70_000]
)
def test_what_is_no_kit_is_refused(content, joined, tmp_path):
    (tmp_path / "x.kit").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a participant's kit"):
        examine(joined, tmp_path / "x.kit")


# Renewal ---------------------------------------------------------------------------------------


def test_renewal_keeps_the_key_and_leaves_the_others_alone(kits, joined):
    others = {
        path: path.read_bytes() for path in kits.rglob("*") if path.is_file() and "north" not in path.name
    }
    key = (joined / "startup" / "client.key").read_bytes()
    before = certificates.read_certificate(joined / "startup" / "client.crt")
    sign(kits, renew(joined).path)
    check_credentials(joined)  # the old certificate works while the new one is on its way
    accept(joined, examine(joined, kits / "north.kit"))
    after = certificates.read_certificate(joined / "startup" / "client.crt")
    assert after.serial_number != before.serial_number
    assert (joined / "startup" / "client.key").read_bytes() == key
    assert not list(joined.glob("*.csr"))
    changed = {path.name for path, content in others.items() if path.read_bytes() != content}
    assert changed == {"issued.json"}
    assert not revoked.RevokedFile(kits / "server").read().serials


def test_a_new_key_ends_the_old_certificate(kits, joined):
    old_key = (joined / "startup" / "client.key").read_bytes()
    serial = certificates.read_certificate(joined / "startup" / "client.crt").serial_number
    request = renew(joined, with_new_key=True)
    assert renew(joined, with_new_key=True).fingerprint == request.fingerprint  # a sent request stays good
    check_credentials(joined)
    sign(kits, request.path)
    assert revoked.RevokedFile(kits / "server").read().serials == {f"{serial:x}"}
    accept(joined, examine(joined, kits / "north.kit"))
    assert (joined / "startup" / "client.key").read_bytes() != old_key
    assert not (joined / "startup" / "next.key").exists()
    assert stat.S_IMODE((joined / "startup" / "client.key").stat().st_mode) == 0o600
    check_credentials(joined)


def test_a_replaced_key_is_never_certified_again(kits, joined, tmp_path, keys):
    sign(kits, renew(joined, with_new_key=True).path)
    (tmp_path / "north.csr").write_bytes(requests.make_request(keys[0], "north"))
    with pytest.raises(ConfigError, match="has a key that was replaced earlier"):
        sign(kits, tmp_path / "north.csr")


def test_a_key_and_a_certificate_that_do_not_fit_do_not_start(joined, keys):
    certificates.write_key(joined / "startup" / "client.key", keys[1])
    with pytest.raises(RunError, match=r"does not match .*identity accept"):
        start_participant(joined)


def dated(kits, folder, path, name, **dates):
    """Replace a certificate by one with other dates."""
    root = authorities.authority(kits)
    key = certificates.key_of(certificates.read_certificate(folder / path))
    (folder / path).write_text(certificates.pem(certificates.issue(root, name, key, **dates)))


@pytest.mark.parametrize(("left", "warned"), [(31, False), (29, True), (1, True)])
def test_both_sides_are_told_before_a_certificate_expires(
    left, warned, kits, joined, tmp_path, capsys, monkeypatch
):
    from fedprllm.cli import coordinator, participant
    from fedprllm.federation.flare import processes

    monkeypatch.setenv("COLUMNS", "300")
    for module in (coordinator, participant):
        monkeypatch.setattr(module, "attend", lambda *arguments: None)
        monkeypatch.setattr(module, "ending", contextlib.nullcontext)
    dated(kits, joined, "startup/client.crt", "north", valid_days=left)
    dated(kits, kits / "server", "startup/server.crt", "localhost", valid_days=left)
    text = tmp_path / "text.txt"
    text.write_text("x")
    participant.participate(joined, data=[str(text)], yes=True)
    said = " ".join(capsys.readouterr().err.split())
    assert ("your certificate expires in" in said) is warned
    assert (f"fedprllm identity renew {joined}" in said) is warned
    coordinator.serve(kits / "server")
    said = " ".join(capsys.readouterr().err.split())
    assert ("the server's certificate expires in" in said) is warned
    assert ("fedprllm federation renew" in said) is warned
    assert processes.check_server(kits / "server") < left


def test_an_expired_certificate_does_not_start(kits, joined, monkeypatch):
    dated(kits, joined, "startup/client.crt", "north", valid_days=1)
    dated(kits, kits / "server", "startup/server.crt", "localhost", valid_days=1)
    at(monkeypatch, days=3)
    day = (datetime.now(UTC) + timedelta(days=1)).date()
    with pytest.raises(RunError, match=rf"participant 'north' expired on {day}.*fedprllm identity renew"):
        start_participant(joined)
    with pytest.raises(RunError, match=rf"server's certificate expired on {day}.*fedprllm federation renew"):
        start_server(kits / "server")
    assert not (joined / "engine").exists()
    assert not (kits / "server" / "console.txt").exists()
    # It can still be renewed.
    sign(kits, renew(joined).path)
    accept(joined, examine(joined, kits / "north.kit"))
    assert check_credentials(joined) > 300


def at(monkeypatch, days):
    """Let the clock of the certificates' module go ahead by some days."""

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=days)

    monkeypatch.setattr(certificates, "datetime", Later)


def test_a_certificate_of_the_future_names_the_clock(joined, monkeypatch):
    at(monkeypatch, days=-2)
    with pytest.raises(RunError, match="Correct this machine's clock"):
        start_participant(joined)


def test_no_certificate_outlives_the_authority_and_an_expired_one_signs_nothing(kits, joined, monkeypatch):
    _, entry = sign(kits, renew(joined).path, valid_days=3000)
    assert entry.ends[:4] == str((datetime.now(UTC) + timedelta(days=3000)).year)
    at(monkeypatch, days=3500)
    _, entry = sign(kits, joined / "north.csr", valid_days=3000)
    root = authorities.authority(kits).certificate
    assert entry.ends == root.not_valid_after_utc.isoformat(timespec="seconds")
    at(monkeypatch, days=4000)
    with pytest.raises(RunError, match=r"authority .* expired on .*federation init"):
        sign(kits, joined / "north.csr")


def test_the_authority_outlives_the_certificates():
    with pytest.raises(ConfigError, match="must outlive"):
        make_plan(valid_days=4000)
    with pytest.raises(ConfigError, match="must outlive"):
        make_plan(valid_days=10, authority_days=10)


def test_server_and_coordinator_are_renewed_for_the_keys_they_have(kits):
    write_kits(make_plan(), kits)
    paths = [kits / "server" / "startup" / "server.crt", kits / "admin" / "startup" / "client.crt"]
    before = [certificates.read_certificate(path) for path in paths]
    assert run("federation", "renew", "--kits", kits).exit_code == 0
    after = [certificates.read_certificate(path) for path in paths]
    for old, new in zip(before, after, strict=True):
        assert old.serial_number != new.serial_number
        assert old.public_key() == new.public_key()
        assert (old.subject, old.issuer) == (new.subject, new.issuer)
        names = [c.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for c in (old, new)]
        assert names[0] == names[1]


# The list of the server ------------------------------------------------------------------------


def test_a_revocation_is_read_by_whoever_watches(tmp_path):
    watched = revoked.RevokedFile(tmp_path)
    assert watched.names() == set()
    revoked.revoke(tmp_path, "north")
    revoked.revoke(tmp_path, "south")
    since = watched.read().names["north"]
    revoked.revoke(tmp_path, "north")  # the first date stays
    revoked.supersede(tmp_path, ["1f", "2e"])
    assert watched.names() == {"north", "south"}
    assert watched.read().names["north"] == since
    revoked.readmit(tmp_path, "north")
    assert watched.names() == {"south"}
    assert watched.read().serials == {"1f", "2e"}


def test_whoever_is_let_in_again_while_the_server_is_down_is_let_in_by_flare_too(tmp_path):
    from nvflare.private.fed.server.client_manager import ClientManager

    path = tmp_path / "disabled_clients.json"
    manager = ClientManager(project_name="x")
    manager.set_disabled_clients_file(str(path))
    for name in ("north", "south"):
        revoked.revoke(tmp_path, name)
        manager.disable_client(name)
    revoked.readmit(tmp_path, "north")
    restarted = ClientManager(project_name="x")
    restarted.set_disabled_clients_file(str(path))
    assert restarted.disabled_clients == {"south"} == revoked.RevokedFile(tmp_path).names()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"names": [], "serials": []}', '{"names": {"a": "b"}}'])
def test_a_damaged_list_refuses_everything_instead_of_nothing(content, tmp_path):
    (tmp_path / revoked.REVOKED).write_text(content)
    with pytest.raises(RunError, match="the revoked participants are unknown"):
        revoked.RevokedFile(tmp_path).read()
    with pytest.raises(RunError, match="the revoked participants are unknown"):
        revoked.revoke(tmp_path, "north")


def test_a_list_is_written_where_the_server_reads_it(tmp_path):
    with pytest.raises(RunError, match="run this command on the server's machine"):
        revoked.revoke(tmp_path / "server", "north")


# Kits of earlier versions ----------------------------------------------------------------------


def test_the_keys_that_an_earlier_version_kept_are_deleted(tmp_path, keys, quick_keys):
    root = certificates.make_root("fedprllm", 360)
    plain = serialization.NoEncryption()

    def text(key):
        formats = serialization.PrivateFormat
        return key.private_bytes(serialization.Encoding.PEM, formats.TraditionalOpenSSL, plain).decode()

    state = {"root_cert": certificates.pem(root.certificate), "root_pri_key": text(root.key)}
    issued = certificates.issue(root, "north", keys[1].public_key(), 100)
    state["north"] = {"cert": certificates.pem(issued), "pri_key": text(keys[1])}
    folder = tmp_path / ".authority" / "fedprllm" / "state"
    folder.mkdir(parents=True)
    write_json(folder / "cert.json", state)
    write_kits(make_plan(), tmp_path)
    assert private_keys(tmp_path / ".authority") == {"root.key"}
    assert authorities.authority(tmp_path).certificate == root.certificate
    # The coordinator knew this key, so it is replaced.
    sign(tmp_path, new_identity("north", tmp_path / "own").path)
    assert revoked.RevokedFile(tmp_path / "server").read().serials == {f"{issued.serial_number:x}"}


def test_ready_kits_are_for_rehearsals_and_init_names_their_keys(tmp_path):
    write_ready_kits(make_plan(), tmp_path / "kits")
    for name in NAMES:
        check_credentials(tmp_path / "kits" / name)
    (tmp_path / "plan.toml").write_text('server = "localhost"\nparticipants = ["north", "south"]\n')
    result = run("federation", "init", tmp_path / "plan.toml", "--out", tmp_path / "kits")
    assert "is a private key of a participant" in " ".join(result.output.split())
    result = run("federation", "init", tmp_path / "plan.toml", "--out", tmp_path / "new")
    assert "private key" not in result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        ".authority", "admin", "federation.json", "server",
    ]  # fmt: skip
