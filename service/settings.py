"""Settings of the service: environment variables (`IDDPM_*`) and command-line flags, validated once at start-up.

docs/settings.md repeats the docstring of each field; a test compares them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from formats.precision import PrecisionChoice
from service.backends.base import BackendOptions, Device, Threads
from service.backends.select import BACKENDS
from service.engine.config import EngineConfig
from service.engine.policies import PolicyName
from service.hosts import Network, canonical_host, network_of, without_brackets

if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal[("auto", *BACKENDS)]
PREFIX = "IDDPM_"
MAY_BE_EMPTY = frozenset({"cache_dir", "engines_dir", "cascades", "host", "models", "allowed_hosts", "trusted_proxies"})
"""Settings for which an empty value is valid or has its own error message."""
OTHER_VARIABLES = frozenset({"IDDPM_KEY", "IDDPM_TEST_LONG", "IDDPM_TEST_CONTAINERS", "IDDPM_REQUIRE_ALL"})
"""Variables that are not settings: the client and the tests read them."""
SERVICE_LINK = re.compile(r"IDDPM_(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
"""Variables that Kubernetes sets in containers if the name of a Service begins with `iddpm`; see `LINK_ADDRESS`."""
LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""Start of the value that Kubernetes gives a variable IDDPM_..._PORT."""
AllowedHost = Annotated[str, AfterValidator(lambda host: host if host == "*" else canonical_host(host))]
TrustedProxy = Annotated[Network, BeforeValidator(lambda value: network_of(value) if isinstance(value, str) else value)]


MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Valid model names. Without separators and leading dots, a name cannot refer to a path outside a folder."""


def read_model(model: Path) -> tuple[str, Path]:
    """Return the name and folder of a model given as NAME=FOLDER, or as FOLDER, whose last component is then the name.

    A path that contains an equals sign is a FOLDER if the folder exists or if a separator precedes the sign.

    Raises:
        ValueError: the name is invalid, or the folder is missing.
    """
    name, equals, folder = str(model).partition("=")
    if not equals or "/" in name or model.is_dir():
        if not model.resolve().name:
            raise ValueError(f"{model} has no name of its own: give it one, NAME={model}")
        return model.resolve().name, model
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(
            "NAME=FOLDER: a name must have 1 to 64 letters, digits, dots, dashes and underscores, and begin with a "
            f"letter or digit; got {name!r}"
        )
    if not folder:
        raise ValueError(f"NAME=FOLDER: the folder is missing; got {str(model)!r}")
    return name, Path(folder)


def _of_engine(name: str) -> Any:
    """Return a copy of a field of `EngineConfig`, with its default and constraints."""
    return copy(EngineConfig.model_fields[name])


@dataclass(frozen=True)
class Cascade:
    """The name of a cascade and those of its models."""

    name: str
    base: str
    upsampler: str

    @property
    def models(self) -> tuple[str, str]:
        """Return the names of its models."""
        return self.base, self.upsampler


def read_cascade(text: str) -> Cascade:
    """Return the cascade given as NAME=BASE+UPSAMPLER.

    Raises:
        ValueError: it has another form.
    """
    name, _, models = text.partition("=")
    base, _, upsampler = models.partition("+")
    if not MODEL_NAME.fullmatch(name) or not base or not upsampler or "+" in upsampler:
        raise ValueError(f"must be NAME=BASE+UPSAMPLER, of two models; got {text!r}")
    return Cascade(name, base, upsampler)


class Settings(BaseSettings):
    """All settings of the service. Flags of `iddpm serve` take precedence over the environment.

    Fields without a docstring are documented in `EngineConfig` or `BackendOptions`.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, protected_namespaces=())

    models: Annotated[tuple[Path, ...], NoDecode] = Field(default=(), validate_default=True)
    """Model folders (comma list): FOLDER (served under the folder's name) or NAME=FOLDER; the first is the default."""
    cascades: Annotated[tuple[str, ...], NoDecode] = ()
    """Cascades (comma list) NAME=BASE+UPSAMPLER of the names of two models, served as one model: the upsampler enlarges
    the base's images."""
    backend: BackendName = "auto"
    """Backend that runs the network; auto: the fastest that is installed, fits the machine and passes its self-test."""
    device: Device = BackendOptions.device
    precision: PrecisionChoice = BackendOptions.precision
    cache_dir: str | None = BackendOptions.cache_dir
    engines_dir: str | None = BackendOptions.engines_dir
    build_engines: bool = False
    """Let the TensorRT backend build missing engines; this takes minutes at start-up for each batch size."""
    torch_compile: bool = BackendOptions.torch_compile
    fuse_update: bool = BackendOptions.fuse_update
    strict_graphs: bool = _of_engine("strict_graphs")
    host: Annotated[str, AfterValidator(without_brackets)] = "127.0.0.1"
    """Address to listen on (`::` includes IPv4; empty: all addresses). One that other machines can reach requires
    `keys_file` or `allow_keyless`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0: any free port."""
    keys_file: Path | None = None
    """File of API keys (`iddpm keys`), reloaded whenever it changes; unset: no key is required."""
    allow_keyless: bool = False
    """Allow listening without keys on an address that other machines can reach."""
    admin_root: Path | None = None
    """Folder with model folders that admins may load, reload and unload by name; unset: these routes do not exist."""
    max_loaded: int = Field(default=4, ge=1)
    """Number of models in memory at which loads are refused; a replaced one counts until its last image is done."""
    threads: Threads | None = BackendOptions.threads
    allowed_hosts: Annotated[tuple[AllowedHost, ...], NoDecode] = ("localhost", "127.0.0.1", "[::1]")
    """Accepted Host headers: names or addresses without scheme and port (comma list); `*` accepts all."""
    trusted_proxies: Annotated[tuple[TrustedProxy, ...], NoDecode] = ()
    """Addresses or networks (comma list) of proxies whose X-Forwarded-For is trusted; from others it is ignored."""
    max_rows: int = _of_engine("max_rows")
    max_queue: int = _of_engine("max_queue")
    max_wait_s: float = _of_engine("max_wait_s")
    max_given_bytes: int = _of_engine("max_given_bytes")
    policy: PolicyName = _of_engine("policy")
    client_share: float = _of_engine("client_share")
    max_request_s: float = Field(default=3600.0, gt=0)
    """Maximum time from a request's admission to its images. What is predicted to take longer is refused (422; 503 if
    it only has to wait for others); if it does, its rows are freed and the answer is 504."""
    max_body_bytes: int = Field(default=65536, ge=1024)
    """Maximum size of a request body without given images; with them, what 64 images of the largest model take."""
    keep_answers_s: float = Field(default=600.0, gt=0)
    """Time for which an answer is kept for requests with the same Idempotency-Key."""
    max_kept_bytes: int = Field(default=64 << 20, ge=0)
    """Maximum memory of the answers kept for Idempotency-Key; the oldest are dropped first."""
    read_timeout_s: float = Field(default=10.0, gt=0)
    """Maximum time from the first byte of a request to its last; after it, the answer is 408."""
    write_timeout_s: float = Field(default=60.0, gt=0)
    """Maximum time in which a client reads nothing of its answer; after it, the connection is closed."""
    keep_alive_s: int = Field(default=130, ge=1)
    """Time for which an idle connection is kept open. It must exceed the keep-alive time of a proxy in front, which
    otherwise may send a request into a closing connection."""
    drain_notice_s: float = Field(default=2.0, ge=0, le=3600)
    """Minimum time after SIGTERM for which new requests are answered with 503, so that a proxy that checks readiness
    sends its requests elsewhere before connections are refused."""
    max_row_steps: int = Field(default=64_000, ge=2)
    """Maximum work of one request: images x steps, doubled with classifier-free guidance."""
    traces: bool = False
    """Send traces of requests to an OpenTelemetry collector (extra `otel`), set by the standard OTEL_* variables."""

    @field_validator("models", "cascades", "allowed_hosts", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("models")
    @classmethod
    def _need_models_of_different_names(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("name a model folder: --model FOLDER, or IDDPM_MODELS")
        named = [read_model(model) for model in value]
        names = [name for name, _ in named]
        for name, folder in named:
            if names.count(name) > 1:
                folders = ", ".join(str(other) for another, other in named if another == name)
                raise ValueError(
                    f"models must have different names; {folders} would all be {name!r}: give them names, as in "
                    f"--model NAME={folder}"
                )
        return value

    @field_validator("cascades")
    @classmethod
    def _need_named_cascades(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        names = [read_model(model)[0] for model in info.data.get("models", ())]
        taken = set(names)
        for cascade in map(read_cascade, value):
            for name in cascade.models:
                if "models" in info.data and name not in names:
                    what = "a cascade is no part of another" if name in taken else f"no model is named {name!r}"
                    raise ValueError(f"{cascade.name}: {what}; the models are {', '.join(names)}")
            if cascade.name in taken:
                raise ValueError(f"{cascade.name!r} is the name of another model or cascade")
            taken.add(cascade.name)
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _pass_over_a_service_link(cls, value: object) -> object:
        is_link = isinstance(value, str) and LINK_ADDRESS.match(value)
        return cls.model_fields["port"].default if is_link else value

    @field_validator("allowed_hosts")
    @classmethod
    def _need_a_host(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("is empty: list the names and addresses that clients use, or * to accept all")
        return value

    @field_validator("*", mode="before")  # of the validators of a mode, the last one defined runs first
    @classmethod
    def _strip(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        stripped = value.strip()  # .env files leave spaces, and a carriage return at the end of a line
        if not stripped and info.field_name not in MAY_BE_EMPTY:
            raise ValueError(f"is empty: give a value, or remove the variable {PREFIX}{str(info.field_name).upper()}")
        return stripped

    @model_validator(mode="after")
    def _refuse_to_be_open_unasked(self) -> Settings:
        if self.keys_file is None and not self.allow_keyless and not _is_loopback(self.host):
            raise ValueError(
                f"host: {self.host!r} is reachable from other machines, and no key is required: set a keys file "
                "(IDDPM_KEYS_FILE, see iddpm keys), or allow access without keys (IDDPM_ALLOW_KEYLESS=true)"
            )
        return self

    @model_validator(mode="after")
    def _refuse_admin_without_keys(self) -> Settings:
        if self.admin_root is not None and self.keys_file is None and not _is_loopback(self.host):
            raise ValueError(
                f"admin_root: {self.host!r} is reachable from other machines, which could load and unload models: set "
                "a keys file (IDDPM_KEYS_FILE, see iddpm keys add --admin)"
            )
        return self

    @property
    def model_folders(self) -> dict[str, Path]:
        """The folders of the models, by name, the default one first."""
        return dict(read_model(model) for model in self.models)

    @property
    def cascade_models(self) -> tuple[Cascade, ...]:
        """The cascades with the names of their models."""
        return tuple(map(read_cascade, self.cascades))

    def engine_config(self) -> EngineConfig:
        """Return the configuration of the engine."""
        return EngineConfig(**self._shared_with(EngineConfig.model_fields))

    def backend_options(self) -> BackendOptions:
        """Return the options of the backends, without `build_engines`."""
        options = self._shared_with(field.name for field in fields(BackendOptions))
        del options["build_engines"]  # a flag here, a callable there
        return BackendOptions(**options)

    def _shared_with(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the settings with these names; ignore names that are not settings."""
        return {name: getattr(self, name) for name in names if name in type(self).model_fields}


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_service_link(name: str, value: str) -> bool:
    return bool(SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and LINK_ADDRESS.match(value)))


def refuse_unknown_variables() -> None:
    """Check for unknown environment variables `IDDPM_*`, because a misspelt limit would have no effect.

    Variables that Kubernetes sets are ignored.

    Raises:
        ValueError: a variable is unknown; the message lists those that exist.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    ours = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    unknown = sorted(name for name, value in ours.items() if name not in known and not _is_service_link(name, value))
    if unknown:
        settings = ", ".join(sorted(known - OTHER_VARIABLES))
        raise ValueError(f"unknown environment variable {', '.join(unknown)}; settings are {settings}")
