"""Starts the web server with the page and the API."""

import ipaddress
import socket
import warnings
from collections.abc import Callable

from la.errors import InputError
from pipelines.config import ServeConfig

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def serve(config: ServeConfig, ready: Callable[[str], None]) -> None:
    """Until it is stopped; `ready` gets the page's address once it can be opened.

    Raises InputError for a checkpoint that cannot be used, an address that is taken, where the packages of the extra
    `serve` are not installed, and as `replicas_queue`.
    """
    try:
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from pipelines.serve.api import build_api
        from pipelines.serve.page import add_page
        from pipelines.serve.queue import model_queue
        from pipelines.serve.service import Service

        if config.replicas:
            from pipelines.serve.replicas import replicas_queue as model_queue
    except ImportError as error:
        raise InputError(
            f"serve needs the package {error.name}, which is not installed: pip install 'label-anything[serve]'."
        ) from error
    listening = _listen(config.host, config.port)
    port = listening.getsockname()[1]
    # NiceGUI looks through all objects for its server, and so touches what torch means to drop.
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op", category=FutureWarning)
    with listening, model_queue(config.model_copy(update={"port": port})) as queue:
        service = Service(config, queue)
        app = build_api(service)
        add_page(app, service)
        if _is_local(config.host):  # another site's name for this machine is none of ours
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_NAMES, config.host])
        host = f"[{config.host}]" if ":" in config.host else config.host
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        ready(f"http://{host}:{port}")
        server.run(sockets=[listening])


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port} cannot be listened on ({error}). Choose another --port, or 0 for any that is "
            "free."
        ) from error
