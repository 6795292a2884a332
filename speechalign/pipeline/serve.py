"""`speechalign serve`: an endpoint on this machine, or on the cluster of RAY_ADDRESS."""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from speechalign.config.codec import CodecConfig, EncodecHfConfig
from speechalign.config.load import read_yaml, validated, with_overrides
from speechalign.config.serving import (
    APPLICATION,
    IMPORT_PATH,
    INGRESS,
    RENDERER,
    ServingConfig,
    is_loopback,
    speaker_name,
)
from speechalign.errors import ConfigError
from speechalign.pipeline.cluster import connected
from speechalign.pipeline.served_run import args_of, section
from speechalign.resources import check_room, possible_resources

logger = logging.getLogger(__name__)

POLL_S = 0.2
SAY_S = 10.0
"""Between two lines on what Serve still waits for."""
HURRIED_S = 1.0
"""To tell Serve to end, when nobody waits until it has."""
CARRIED = frozenset({"proxy_location", "http_options", "applications"})
"""Keys of a file that `Endpoint.to_serve` writes again."""
FIXED = {"name": APPLICATION, "route_prefix": "/", "import_path": IMPORT_PATH}
"""What an application may say besides its `args`, since it would be served so anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """What is served, and where."""

    config: ServingConfig
    host: str
    port: int
    http_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of Serve's proxies; `host` and `port` stand above theirs."""
    proxy_location: str = "HeadOnly"
    swapped: Mapping[str, Path] = field(default_factory=dict[str, Path])
    """Policies that take the place of the config's, in the processes that serve already."""

    is_draining: bool = False
    """Lets no new stream in, and is deployed when the open ones have ended."""

    @property
    def address(self) -> str:
        """Where clients find it."""
        scheme = "https" if self.http_options.get("ssl_certfile") else "http"
        return f"{scheme}://{self.host}:{self.port}"

    def with_policy(self, name: str, path: Path) -> "Endpoint":
        """Return the endpoint with another policy under a name it has already."""
        return replace(self, swapped={**self.swapped, name: path})

    def to_serve(self) -> dict[str, Any]:
        """Return the file that `serve deploy` would be given."""
        deployments = [
            {
                "name": speaker_name(name),
                "user_config": self.config.policies[name]
                .model_copy(update={"path": path})
                .model_dump(mode="json"),
            }
            for name, path in self.swapped.items()
        ]
        if self.is_draining:
            deployments.append({"name": INGRESS, "user_config": {"is_draining": True}})
        application = {
            **FIXED,
            "args": self.config.model_dump(mode="json"),
            "deployments": deployments,
        }
        return {
            "proxy_location": self.proxy_location,
            "http_options": {**self.http_options, "host": self.host, "port": self.port},
            "applications": [application],
        }


def read_endpoint(
    file: Path, policy: Path | None, overrides: Sequence[str], listen: str | None
) -> Endpoint:
    """Read a file of Ray Serve with one application of ours.

    Args:
        file: as `serve deploy` takes it.
        policy: a policy's folder, or a run: then its start is served as `base` and its best
            policy as `aligned`, with the codec, NAR model and golden tokens of the run. None:
            what the file says.
        overrides: dotted, of the application's `args`.
        listen: `HOST:PORT` instead of the file's.

    Raises:
        ConfigError: the file is no such file or says what would be ignored, the folder holds no
            policy, or an override lets anonymous clients into an endpoint that others can reach.
    """
    values = read_yaml(file)
    args = _args(values, file)
    if policy is not None:
        args |= args_of(policy, args)
    http_options: dict[str, Any] = values.get("http_options") or {}
    host, port = _address(http_options, listen)
    args["access"] = section(args, "access")
    if not is_loopback(host):
        # Somebody else can reach it: what is fine on a laptop would be an open door here.
        args["access"]["allow_anonymous"] = False
    config = validated(ServingConfig, with_overrides(args, overrides), f"{file}, applications.args")
    if config.access.allow_anonymous and not is_loopback(host):
        raise ConfigError(
            f"access.allow_anonymous would let in everybody who reaches {host}:{port}; set "
            f"access.keys_file or {config.access.keys_env}, or listen at 127.0.0.1"
        )
    return Endpoint(
        config=_resolved(config),
        host=host,
        port=port,
        http_options=http_options,
        proxy_location=values.get("proxy_location") or "HeadOnly",
    )


def _args(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the `args` of a file's one application, and refuse what would be ignored."""
    applications = values.get("applications")
    match applications:
        case [dict(application)]:
            args = application.pop("args", None)
        case _:
            raise ConfigError(f"{file} must have `applications` with exactly one of speechalign's")
    ignored = [key for key in values if key not in CARRIED]
    ignored += [
        f"applications.{key}" for key, value in application.items() if FIXED.get(key) != value
    ]
    if ignored:
        fixed = ", ".join(f"{key} {value}" for key, value in FIXED.items())
        raise ConfigError(
            f"{file}: `speechalign serve` would ignore {', '.join(ignored)}; take it out (it "
            f"serves {fixed}), or give the file to `serve deploy`"
        )
    return dict(args or {})


def _resolved(config: ServingConfig) -> ServingConfig:
    """Return the config with paths that mean the same in every process of this machine."""
    policies = {
        name: policy.model_copy(
            update={
                "path": policy.path.resolve(),
                "reward_model": policy.reward_model and policy.reward_model.resolve(),
            }
        )
        for name, policy in config.policies.items()
    }
    voices = config.voices.model_copy(
        update={
            "golden": config.voices.golden.resolve(),
            "uploads": config.voices.uploads and config.voices.uploads.resolve(),
        }
    )
    access = config.access.model_copy(
        update={"keys_file": config.access.keys_file and config.access.keys_file.resolve()}
    )
    changed = {
        "policies": policies,
        "voices": voices,
        "access": access,
        "codec": _resolved_codec(config.codec),
        "nar": config.nar.resolve(),
    }
    return config.model_copy(update=changed)


def _resolved_codec(codec: CodecConfig) -> CodecConfig:
    if not isinstance(codec, EncodecHfConfig):
        return codec.model_copy(update={"path": codec.path and codec.path.resolve()})
    folder = Path(codec.model)  # or a name on a hub, which is none
    return codec.model_copy(update={"model": str(folder.resolve())}) if folder.is_dir() else codec


def _address(http_options: Mapping[str, Any], listen: str | None) -> tuple[str, int]:
    given = (
        f"{http_options.get('host', '127.0.0.1')}:{http_options.get('port', 8000)}"
        if listen is None
        else listen
    )
    host, _, port = given.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ConfigError(f"{given!r} is no address to listen at; write e.g. 127.0.0.1:8000")
    return host.strip("[]"), int(port)


@contextmanager
def deployed(endpoint: Endpoint, *, stays: bool = False) -> Iterator[str]:
    """Serve inside the block; yields the address. Streams that are open may finish at the end.

    Args:
        endpoint: what to serve. When an application is there already it is updated: a policy of
            `swapped` is loaded in place, anything else rolls over to new processes.
        stays: what is served goes on after the block.

    Raises:
        ConfigError, DataError: the endpoint could never work, the cluster has no room for it, or
            its Serve listens on another address; raised before a process is started.
    """
    from speechalign.serving.app import check_endpoint

    check_endpoint(endpoint.config)
    with connected():
        from ray import serve

        _check_room(endpoint.config)
        _start_serve(endpoint)
        try:
            _deploy(endpoint)
            yield endpoint.address
        except KeyboardInterrupt:
            if not stays:
                # Serve would be waited for, up to 30 s, while its replicas finish their streams.
                _serve_client().shutdown(timeout_s=HURRIED_S)
            raise
        finally:
            if not stays:
                serve.shutdown()


def _check_room(config: ServingConfig) -> None:
    """Refuse replicas that can never all start; Serve would wait for them for ever.

    Raises:
        ConfigError: naming what is missing, and which deployment wants how much.
    """
    replicas = {INGRESS: config.ingress_replicas, RENDERER: config.renderer_replicas}
    replicas |= {speaker_name(name): config.speaker_replicas for name in config.policies}
    parts = {name: (one.min_replicas, one) for name, one in replicas.items()}
    knobs = "min_replicas of speaker_replicas, renderer_replicas or ingress_replicas"
    check_room("the endpoint wants", parts, possible_resources(), knobs)


def _start_serve(endpoint: Endpoint) -> None:
    """Start Serve, if the cluster has none yet; it would ignore another address in silence."""
    from ray import serve

    options = endpoint.to_serve()["http_options"]
    serve.start(proxy_location=endpoint.proxy_location, http_options=options)
    running = _serve_client().http_config
    if (running.host, running.port) != (endpoint.host, endpoint.port):
        raise ConfigError(
            f"this cluster's Serve listens on {running.host}:{running.port} already; give "
            f"--listen {running.host}:{running.port}, or end it with `serve shutdown`"
        )


def _serve_client() -> Any:
    from ray.serve import context

    return context._get_global_client()  # pyright: ignore[reportPrivateUsage]


def _deploy(endpoint: Endpoint) -> None:
    """Do what `serve deploy` does, without its dashboard; the one place with private names."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    _serve_client().deploy_apps(ServeDeploySchema.model_validate(endpoint.to_serve()))
    last_said = time.monotonic()
    while True:
        application = serve.status().applications.get(APPLICATION)
        status = application.status if application else "NOT_STARTED"
        if status == "RUNNING":
            return
        if application and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ConfigError(f"the endpoint did not start: {application.message}")
        if application and time.monotonic() - last_said >= SAY_S:
            last_said = time.monotonic()
            logger.info("Serve is not done yet: %s", _what_waits(application))
        time.sleep(POLL_S)


def _what_waits(application: Any) -> str:
    """Return what Serve says of an application and of its deployments that are not healthy."""
    waiting = [
        f"{name} {one.status.value} {one.message}".strip()
        for name, one in application.deployments.items()
        if one.status.value != "HEALTHY"
    ]
    return "; ".join([application.message, *waiting] if application.message else waiting)


def _drain(endpoint: Endpoint) -> None:
    """Let no stream in, and return when every replica of the ingress has finished its own.

    Serve ends all deployments of an application at once, so a stream would find no speaker for
    its next sentence.
    """
    _deploy(replace(endpoint, is_draining=True))


def serve_until_told(endpoint: Endpoint) -> None:
    """Serve until SIGINT or SIGTERM; open streams are finished first, unless told again."""
    ended = threading.Event()
    with deployed(endpoint) as address:

        def end(_number: int, _frame: FrameType | None) -> None:
            ended.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)  # after ray.init, which sets its own
        names = ", ".join(endpoint.config.policies)
        logger.info("speaking at %s (policies: %s); stop with Ctrl-C", address, names)
        ended.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        logger.info(
            "finishing open streams, at most %g s; Ctrl-C again cuts them", endpoint.config.drain_s
        )
        _drain(endpoint)
