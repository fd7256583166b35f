"""What a cluster in memory is made of: a clock, keys and their tokens, workers."""

from __future__ import annotations

from typing import Any

import trio

from peer.state import command, enrol, key
from peer.state.key import ApiKey
from peer.state.metric import WorkerMetrics
from peer.state.model import Replica, ReplicaState
from peer.state.worker import DeviceInfo, EngineState, HostInfo, Telemetry, Worker, WorkerReport

WALL = 1_748_599_200.0  # 2025-05-30T10:00:00Z
GIB = 2**30
SECRETS = {"admin": "a" * 64, "read": "b" * 64, "submit": "c" * 64, "operate": "d" * 64, "limited": "e" * 64}


def token(name: str) -> str:
    return key.token(name, SECRETS[name])


class FakeClock:
    """Starts at the document's moment; `now` may be moved."""

    def __init__(self) -> None:
        self.offset = 0.0

    def now(self) -> float:
        return 1_000.0 + self.offset

    def wall(self) -> float:
        return WALL + self.offset

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


def api_key(name: str, *scopes: str, limited: bool = False, **overrides: Any) -> ApiKey:
    rates: dict[str, Any] = {} if limited else {"requests_per_hour": None, "requests_per_minute": None}
    fields: dict[str, Any] = {
        "key_id": name,
        "owner": f"{name}-owner",
        "scopes": scopes,
        "secret_sha256": key.digest(SECRETS[name]),
        "created_at": WALL,
    }
    return ApiKey(**(fields | rates | overrides))


def worker_view(
    worker_id: str, status: str = "online", temperature: float | None = 65.0, reported: bool = True
) -> command.WorkerView:
    device = DeviceInfo(
        device="AMD", name="AMD Radeon RX 7900 XTX", architecture="gfx1100", driver_version="ROCm 5.7.0"
    )
    replicas = (
        Replica(
            worker_id=worker_id,
            model_name="llama-2-7b",
            state=ReplicaState.READY,
            memory_bytes=int(6.5 * GIB),
            load_s=45.2,
            last_used=WALL - 300,
            slots=3,
        ),
        Replica(
            worker_id=worker_id,
            model_name="smollm2-135m",
            state=ReplicaState.LOADING,
            stage="upload",
            done=1,
            total=4,
        ),
    )
    report = WorkerReport(
        worker_id=worker_id,
        peer_id="peer-1",
        state=EngineState.READY,
        device=device,
        host=HostInfo(
            cpu="AMD Ryzen 9 7950X", ram_total_bytes=64 * GIB, ram_used_bytes=12 * GIB, os="Ubuntu 22.04"
        ),
        telemetry=Telemetry(
            memory_total_bytes=25_753_026_560,
            memory_used_bytes=8 * GIB,
            temperature_c=temperature,
            utilization_percent=75.51,
            source="sysfs",
        ),
        replicas=replicas,
        slots_max=8,
    )
    return command.WorkerView(
        worker=Worker(worker_id=worker_id, peer_id="peer-1", device=device, first_seen=WALL - 1000),
        status=status,
        report=report if reported else None,
        replicas=replicas,
        current_tasks=2,
        last_heartbeat=WALL if reported else None,
        metrics=WorkerMetrics(
            completed_today=45,
            average_run_s=2.31,
            success_rate_percent=98.52,
            tasks_last_hour=120,
            average_response_s=1.84,
            error_rate=0.02,
            tokens_per_s=33.33,
        ),
        performance_score=8.53,
    )


def host(peer_id: str, *, voter: bool) -> enrol.Host:
    return enrol.Host(
        peer_id=peer_id,
        enrolled_at=WALL - 86_400,
        serial="5eed",
        key_sha256="0" * 64,
        expires_at=WALL + 29 * 86_400,
        voter=voter,
        addresses=("10.0.0.2",),
    )
