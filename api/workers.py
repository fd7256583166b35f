"""Workers: what they are, how they do, restarting them."""

from __future__ import annotations

from typing import Literal

import msgspec

from api import format, schemas, stale
from api.http import Call, Param, Reply, Route, query_choice
from api.stale import STALE, STALE_HEADER
from peer.state import command
from peer.state.model import Replica, ReplicaState

_encode = msgspec.json.Encoder().encode

STATUSES = ("online", "offline", "busy", "error")
LOADED = frozenset({ReplicaState.READY, ReplicaState.DRAINING})
REPLICA_SHOWN = {state: "loaded" if state is ReplicaState.READY else state.value for state in ReplicaState}


def gpu_info(view: command.WorkerView) -> schemas.GpuInfo:
    report = view.report
    device = report.device if report else view.worker.device
    told = report.telemetry if report else None
    return schemas.GpuInfo(
        model=device.name,
        memory_total=format.memory(told.memory_total_bytes) if told else None,
        memory_used=format.memory(told.memory_used_bytes) if told else None,
        temperature=None if told is None or told.temperature_c is None else round(told.temperature_c),
        utilization=format.percent(told.utilization_percent) if told else None,
        driver_version=device.driver_version or None,
        memory_total_bytes=told.memory_total_bytes if told else None,
        memory_used_bytes=told.memory_used_bytes if told else None,
        architecture=device.architecture,
        device=device.device,
        stand_in=device.stand_in,
        telemetry_source=told.source or None if told else None,
    )


def summary(view: command.WorkerView) -> schemas.WorkerSummary:
    return schemas.WorkerSummary(
        worker_id=view.worker.worker_id,
        status=view.status,
        gpu_info=gpu_info(view),
        loaded_models=tuple(r.model_name for r in view.replicas if r.state in LOADED),
        current_tasks=view.current_tasks,
        last_heartbeat=format.timestamp_or_none(view.last_heartbeat),
        performance_score=round(view.performance_score, 1),
        message=view.report.message if view.report else "",
        peer_id=view.worker.peer_id,
    )


def _system_info(view: command.WorkerView) -> schemas.SystemInfo:
    host = view.report.host if view.report else None
    return schemas.SystemInfo(
        cpu=host.cpu if host else None,
        ram_total=format.memory(host.ram_total_bytes) if host else None,
        ram_used=format.memory(host.ram_used_bytes) if host else None,
        os=host.os if host else None,
        hostname=host.hostname or None if host else None,
        ram_total_bytes=host.ram_total_bytes if host else None,
        ram_used_bytes=host.ram_used_bytes if host else None,
    )


def _loaded(replica: Replica) -> schemas.LoadedModel:
    return schemas.LoadedModel(
        name=replica.model_name,
        memory_usage=format.memory(replica.memory_bytes),
        load_time=format.estimate(replica.load_s),
        last_used=format.timestamp_or_none(replica.last_used),
        status=REPLICA_SHOWN[replica.state],
        memory_usage_bytes=replica.memory_bytes,
        load_time_seconds=round(replica.load_s, 3),
    )


def detail(view: command.WorkerView) -> schemas.WorkerDetail:
    measured, report = view.metrics, view.report
    return schemas.WorkerDetail(
        worker_id=view.worker.worker_id,
        status=view.status,
        gpu_info=gpu_info(view),
        system_info=_system_info(view),
        loaded_models=[_loaded(r) for r in view.replicas if r.state in LOADED],
        task_history=schemas.TaskHistory(
            completed_today=measured.completed_today,
            average_duration=format.duration_or_none(measured.average_run_s),
            success_rate=format.percent(measured.success_rate_percent),
            average_duration_seconds=measured.average_run_s,
        ),
        metrics=schemas.WorkerMetrics(
            tasks_per_hour=measured.tasks_last_hour,
            average_response_time=format.duration_or_none(measured.average_response_s),
            error_rate=None if measured.error_rate is None else round(measured.error_rate, 4),
            average_response_time_seconds=measured.average_response_s,
            tokens_per_second=format.percent(measured.tokens_per_s),
        ),
        current_tasks=view.current_tasks,
        last_heartbeat=format.timestamp_or_none(view.last_heartbeat),
        performance_score=round(view.performance_score, 1),
        message=report.message if report else "",
        peer_id=view.worker.peer_id,
        slots_max=report.slots_max if report else None,
        engine_deaths=report.deaths if report else None,
    )


def _is_type(view: command.WorkerView, wanted: str) -> bool:
    device = view.report.device if view.report else view.worker.device
    return wanted in device.name.casefold() or wanted == device.architecture.casefold()


async def list_workers(call: Call) -> Reply:
    status = query_choice(call.query, "status", STATUSES)
    gpu_type = call.query.get("gpu_type", "").casefold()
    views: tuple[command.WorkerView, ...] = await stale.read(call, command.ListWorkers())
    listed = [
        view
        for view in views
        if (status is None or view.status == status) and (not gpu_type or _is_type(view, gpu_type))
    ]
    counts = {name: sum(view.status == name for view in listed) for name in STATUSES}
    return stale.reply(
        call,
        schemas.WorkerList(
            workers=[summary(view) for view in listed],
            total=len(listed),
            online=counts["online"] + counts["busy"],
            offline=counts["offline"],
            busy=counts["busy"],
            error=counts["error"],
        ),
    )


async def get_worker(call: Call) -> Reply:
    view = await stale.read(call, command.GetWorker(worker_id=call.args[0]))
    return stale.reply(call, detail(view))


async def restart_worker(call: Call) -> Reply:
    reply: command.RestartReply = await call.api.cluster.call(command.RestartWorker(worker_id=call.args[0]))
    return Reply(
        _encode(
            schemas.RestartStarted(
                message="Worker restart initiated",
                worker_id=reply.worker_id,
                estimated_downtime=format.estimate(reply.estimated_s),
                estimated_downtime_seconds=round(reply.estimated_s, 3),
                requeued_tasks=reply.requeued_tasks,
            )
        )
    )


ROUTES = (
    Route(
        "GET",
        "/workers",
        list_workers,
        "read",
        "All workers",
        schemas.WorkerList,
        query=(
            Param("status", Literal["online", "offline", "busy", "error"], "Only workers of this status"),
            Param("gpu_type", str, "Only workers whose GPU's name contains this, or of this architecture"),
            STALE,
        ),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "GET",
        "/workers/{worker_id}",
        get_worker,
        "read",
        "One worker",
        schemas.WorkerDetail,
        query=(STALE,),
        errors=(404,),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "POST",
        "/workers/{worker_id}/restart",
        restart_worker,
        "operate",
        "Restart a worker's engine",
        schemas.RestartStarted,
        errors=(404, 409),
    ),
)
