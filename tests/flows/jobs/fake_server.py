"""A job server on loopback that speaks the part of Ray's REST that jobs need, and that can go away."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import zipfile
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

PIECE = 7  # characters a message: lines are cut anywhere
NODE = "a" * 56


class FakeJobServer:
    """One job at a time, whose log and status the test writes.

    Attributes:
        jobs: what was submitted, by id.
        status, log, message: of every job.
        resources: of the nodes.
        has_autoscaler: whether the cluster says so.
        refuses_tails: answer requests to follow a log as some proxies do.
        loses_answers: take this many submissions without an answer.
        requests: methods and paths, in order.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.status, self.log, self.message = "RUNNING", "", ""
        self.resources: list[dict[str, float]] = [{"CPU": 2.0}, {"CPU": 1.0}]
        self.has_autoscaler = False
        self.refuses_tails = False
        self.loses_answers = 0
        self.requests: list[str] = []
        self.port = 0
        self._is_away = False
        self._runner: web.AppRunner | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._do(self._start())

    def stop(self) -> None:
        """Close the port and break every connection."""
        self._do(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def sent_files(self) -> dict[str, bytes]:
        """What the only package holds, by path."""
        [content] = self.packages.values()
        archive = zipfile.ZipFile(io.BytesIO(content))
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)

    async def _start(self) -> None:
        self._is_away = False
        app = web.Application(client_max_size=1 << 28, middlewares=[self._note])
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/packages/{protocol}/{name}", self._find_package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._take_package)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_get("/api/jobs/{id}", self._info)
        app.router.add_get("/api/jobs/{id}/logs", self._whole_log)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        app.router.add_post("/api/jobs/{id}/stop", self._stop_job)
        app.router.add_get("/api/v0/nodes", self._nodes)
        app.router.add_get("/api/cluster_status", self._cluster_status)
        self._runner = web.AppRunner(app, shutdown_timeout=0.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        self._is_away = True
        if self._runner is not None:
            for connection in self._runner.server.connections if self._runner.server else ():
                if connection.transport is not None:
                    connection.transport.abort()
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def _find_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _take_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _submit(self, request: web.Request) -> web.Response:
        job = await request.json()
        if job["submission_id"] in self.jobs:
            return web.Response(status=400, text="a job of that id was submitted")
        self.jobs[job["submission_id"]] = job
        if self.loses_answers:
            self.loses_answers -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"job_id": job["submission_id"], "submission_id": job["submission_id"]})

    def _details(self, job: dict[str, Any]) -> dict[str, Any]:
        known: dict[str, Any] = {
            key: job[key] for key in ("submission_id", "entrypoint", "metadata", "runtime_env") if key in job
        }
        ended = self.status in ("SUCCEEDED", "FAILED", "STOPPED")
        times = {"start_time": 1_700_000_000_000, "end_time": 1_700_000_075_000 if ended else None}
        exit_code = {"FAILED": 1, "SUCCEEDED": 0}.get(self.status)
        state = {"type": "SUBMISSION", "status": self.status, "message": self.message, "driver_exit_code": exit_code}
        return {**known, **state, **times}

    async def _list(self, _request: web.Request) -> web.Response:
        driver = {"type": "DRIVER", "job_id": "01000000", "status": "RUNNING", "entrypoint": "python"}
        return web.json_response([driver, *(self._details(job) for job in self.jobs.values())])

    async def _info(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.Response(status=404, text=f"Job {request.match_info['id']} does not exist")
        return web.json_response(self._details(job))

    async def _whole_log(self, _request: web.Request) -> web.Response:
        return web.json_response({"logs": self.log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        if self.refuses_tails:
            return web.Response(status=400, text="no upgrade")
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sent = 0
        while not self._is_away:
            ended = self.status in ("SUCCEEDED", "FAILED", "STOPPED")
            while sent < len(self.log):
                await socket.send_str(self.log[sent : sent + PIECE])
                sent = min(sent + PIECE, len(self.log))
            if ended:
                break
            await asyncio.sleep(0.01)
        return socket

    async def _stop_job(self, _request: web.Request) -> web.Response:
        self.status = "STOPPED"
        self.log += "terminated\n"
        return web.json_response({"stopped": True})

    async def _nodes(self, _request: web.Request) -> web.Response:
        nodes = [{"state": "ALIVE", "resources_total": one} for one in self.resources]
        dead = {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0}}
        return web.json_response({"data": {"result": {"result": [*nodes, dead]}}})

    async def _cluster_status(self, _request: web.Request) -> web.Response:
        kind = "head" if self.has_autoscaler else f"node_{NODE}"
        report = {"autoscalerReport": {"nodeTypeMapping": {NODE: kind}}}
        return web.Response(text=json.dumps({"data": {"clusterStatus": report}}), content_type="application/json")
