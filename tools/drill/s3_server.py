"""An S3 server on this machine that fails when told to: moto, a development dependency, plays it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyarrow import fs


class Server:
    """An S3 server that answers 500 to the next `failing` requests."""

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Silent(WSGIRequestHandler):
            def log(self, *_: object) -> None:
                pass

        self.failing = 0
        self.failed = 0
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self.http = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Silent)

    def _answer(self, environ: dict, start_response) -> object:
        if self.failing:
            self.failing -= 1
            self.failed += 1
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._s3(environ, start_response)

    def folder(self, bucket: str) -> str:
        """The URI of a folder in a new bucket."""
        query = (
            f"endpoint_override=127.0.0.1:{self.http.server_port}&scheme=http&region=us-east-1"
            "&allow_bucket_creation=true"
        )
        filesystem, _ = fs.FileSystem.from_uri(f"s3://{bucket}/?{query}")
        filesystem.create_dir(bucket)
        return f"s3://{bucket}/stores?{query}"


@contextmanager
def s3_server() -> Iterator[Server]:
    """Run a server, and let this process and those it starts have credentials that it takes."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    server = Server()
    threading.Thread(target=server.http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.http.shutdown()
