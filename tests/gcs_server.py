"""A stand-in for Google Cloud Storage: an HTTP server with the part of its JSON API that gcsfs, google-cloud-storage and tensorstore use.

Paths, parameters and JSON are those of the JSON API's reference. Writes and deletions obey `ifGenerationMatch`, which the public emulators
leave out and on which the lock of a run depends.
"""

import base64
import itertools
import json
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Blob(NamedTuple):
    data: bytes
    generation: int


class Storage(ThreadingHTTPServer):
    """Buckets as {name: {object name: Blob}}, and the requests as "METHOD path"."""

    daemon_threads = True

    def __init__(self, *buckets):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.buckets, self.requests, self.uploads = {name: {} for name in buckets}, [], {}
        self.lock, self.numbers = threading.RLock(), itertools.count(1)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass  # clients close connections that they no longer need

    def put(self, bucket, name, data):
        with self.lock:
            self.buckets[bucket][name] = Blob(data, next(self.numbers))

    def names(self, bucket, prefix=""):
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))


def _resource(bucket, name, blob):
    checksum = base64.b64encode(struct.pack(">I", _crc32c(blob.data))).decode()
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{blob.generation}",
        "bucket": bucket,
        "name": name,
        "generation": str(blob.generation),
        "metageneration": "1",
        "size": str(len(blob.data)),
        "crc32c": checksum,
        "etag": str(blob.generation),
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


def _crc32c(data):
    import google_crc32c

    return google_crc32c.value(data)


class _Refused(Exception):
    def __init__(self, status, reason):
        self.status, self.reason = status, reason


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are sent in one packet each; without this, the second waits for the acknowledgement of the first.
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _answer(self, value=b"", status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        self.wfile.write(body)

    def _serve(self):
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            with self.server.lock:
                self._route(url.path, body)
        except _Refused as refused:
            self._answer({"error": {"code": refused.status, "message": refused.reason}}, refused.status)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _bucket(self, name):
        if name not in self.server.buckets:
            raise _Refused(404, f"The specified bucket does not exist: {name}")
        return self.server.buckets[name]

    def _route(self, path, body):
        if match := re.fullmatch(r"(?:/upload|/resumable/upload)/storage/v1/b/([^/]+)/o", path):
            return self._upload(match[1], body)
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path):
            source, name, target, new = map(unquote, match.groups())
            resource = self._write(target, new, self._get(source, name).data)
            done = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
            return self._answer(done if "/rewriteTo/" in path else resource)
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
            bucket, name, new = map(unquote, match.groups())
            resource = self._write(bucket, new, self._get(bucket, name).data)
            del self.server.buckets[bucket][name]
            return self._answer(resource)
        if match := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", path):
            return self._object(match[1], unquote(match[2]))
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            return self._answer(self._list(match[1]))
        if match := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            self._bucket(match[1])
            return self._answer({"kind": "storage#bucket", "name": match[1], "id": match[1], "location": "US", "storageClass": "STANDARD"})
        raise _Refused(404, f"Not Found: {path}")

    def _get(self, bucket, name):
        if name not in self._bucket(bucket):
            raise _Refused(404, f"No such object: {bucket}/{name}")
        return self.server.buckets[bucket][name]

    def _check_generation(self, bucket, name):
        blob = self._bucket(bucket).get(name)
        there = blob.generation if blob else 0
        if "ifGenerationMatch" in self.query and int(self.query["ifGenerationMatch"]) != there:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def _write(self, bucket, name, data):
        self._check_generation(bucket, name)
        self.server.put(bucket, name, data)
        return _resource(bucket, name, self.server.buckets[bucket][name])

    def _upload(self, bucket, body):
        kind = self.query["uploadType"]
        if kind == "media":
            return self._answer(self._write(bucket, self.query["name"], body))
        if kind == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            parts = body.split(b"--" + boundary)[1:3]
            end = b"\r\n" if parts[0].startswith(b"\r\n") else b"\n"  # gcsfs sends the latter
            about, data = (part.split(end + end, 1)[1].removesuffix(end) for part in parts)
            return self._answer(self._write(bucket, json.loads(about).get("name") or self.query["name"], data))
        if "upload_id" not in self.query:  # begins a resumable upload
            self._check_generation(bucket, name := self.query.get("name") or json.loads(body)["name"])
            number = str(next(self.server.numbers))
            self.server.uploads[number] = bytearray()
            match = self.query.get("ifGenerationMatch")
            address = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}&name={name}"
            return self._answer({}, Location=address + (f"&ifGenerationMatch={match}" if match else ""))
        held = self.server.uploads[self.query["upload_id"]]
        held += body
        if self.headers["Content-Range"].endswith("/*"):
            return self._answer(b"", 308, Range=f"bytes=0-{len(held) - 1}")
        return self._answer(self._write(bucket, self.query["name"], bytes(held)))

    def _object(self, bucket, name):
        if self.command == "DELETE":
            self._get(bucket, name)
            self._check_generation(bucket, name)
            del self.server.buckets[bucket][name]
            return self._answer(b"", 204)
        blob = self._get(bucket, name)
        if self.query.get("ifGenerationNotMatch") == str(blob.generation):
            return self._answer(b"", 304)
        self._check_generation(bucket, name)
        if self.query.get("alt") != "media":
            return self._answer(_resource(bucket, name, blob))
        about = _resource(bucket, name, blob)
        headers = {"x-goog-generation": blob.generation, "x-goog-hash": f"crc32c={about['crc32c']}", "ETag": about["etag"]}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._answer(blob.data, Content_Type="application/octet-stream", **headers)
        size = len(blob.data)
        first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        last = min(size - 1, int(asked[2])) if asked[1] and asked[2] else size - 1
        if first >= size:
            return self._answer(b"", 416, Content_Range=f"bytes */{size}")
        data = blob.data[first : last + 1]
        return self._answer(data, 206, Content_Type="application/octet-stream", Content_Range=f"bytes {first}-{last}/{size}", **headers)

    def _list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        items, prefixes = [], set()
        for name, blob in sorted(self._bucket(bucket).items()):
            if not name.startswith(prefix) or name < self.query.get("startOffset", "") or name >= self.query.get("endOffset", "\U0010ffff"):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(_resource(bucket, name, blob))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
