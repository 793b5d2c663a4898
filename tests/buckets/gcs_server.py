"""`python -m tests.buckets.gcs_server start ...`: gcp-storage-emulator, with generations for tensorstore.

The emulator numbers an object's generations, but neither names them beside an object's contents nor heeds the
conditions on them by which a client reads what has changed, and writes only what has not. Nor does it know
ranges that are counted from the end.
"""

from http import HTTPStatus
from socketserver import TCPServer

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def with_conditions(handle):
    def handler(request, response, storage, *args, **kwargs):
        asked = {key: values[0] for key, values in request.query.items()}
        name = asked.get("name") or request.params.get("object_id")
        before = generation(storage, request.params["bucket_name"], name)
        if asked.get("ifGenerationMatch", before) != before:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif asked.get("ifGenerationNotMatch") == before:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handle(request, response, storage, *args, **kwargs)
            response["X-Goog-Generation"] = generation(storage, request.params["bucket_name"], name)

    return handler


def generation(storage, bucket, name):
    """Of an object that is there; 0 of none."""
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except (NotFound, TypeError):  # a request that names its object in its body
        return "0"


def with_last_bytes(handle):
    def handler(request, response, storage, *args, **kwargs):
        header, asked = request.get_header, request.get_header("range", None) or ""
        if asked.startswith("bytes=-"):
            data = storage.get_file(request.params["bucket_name"], request.params["object_id"])
            first = max(0, len(data) - int(asked.removeprefix("bytes=-")))
            request.get_header = lambda name, *rest: (
                f"bytes={first}-" if name == "range" else header(name, *rest)
            )
        handle(request, response, storage, *args, **kwargs)

    return handler


objects.download = with_last_bytes(objects.download)
for verb in ("get", "insert", "delete", "download"):  # before the server takes them up
    setattr(objects, verb, with_conditions(getattr(objects, verb)))

if __name__ == "__main__":
    TCPServer.request_queue_size = 128  # a client that asks for many ranges at once is not sent away
    from gcp_storage_emulator.__main__ import main

    main()
