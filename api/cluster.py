"""The cluster as a whole: status, metrics, rebalancing."""

from __future__ import annotations

from typing import Literal

import msgspec

from api import format, schemas, stale
from api.decode import BodyDecoder
from api.http import Call, Param, Reply, Route, query_choice
from api.stale import STALE, STALE_HEADER
from peer.state import command, metric, plan
from peer.state.voter import Room

_encode = msgspec.json.Encoder().encode
_decode_rebalance = BodyDecoder(schemas.Rebalance)

TIMEFRAME_DEFAULT = "24h"


async def status(call: Call) -> Reply:
    found: command.ClusterStatus = await stale.read(call, command.GetStatus())
    return stale.reply(
        call,
        schemas.ClusterStatus(
            cluster_id=found.cluster_id,
            status=found.status,
            total_workers=found.total_workers,
            active_workers=found.active_workers,
            queued_tasks=found.queued_tasks,
            running_tasks=found.running_tasks,
            gpu_utilization=round(found.gpu_utilization, 1),
            total_memory=format.memory(found.total_memory_bytes),
            available_memory=format.memory(found.available_memory_bytes),
            uptime=format.uptime(found.uptime_s),
            total_memory_bytes=found.total_memory_bytes,
            available_memory_bytes=found.available_memory_bytes,
            uptime_seconds=round(found.uptime_s, 3),
            leader=found.leader,
            epoch=found.epoch,
            reasons=found.reasons,
            voters=tuple(
                schemas.Voter(peer_id=each.peer_id, learner=each.learner, linked=each.linked)
                for each in found.voters
            ),
            outlook=found.outlook,
            store=_room(found.room) if found.room.quota_bytes else None,
        ),
    )


def _room(room: Room) -> schemas.StoreRoom:
    return schemas.StoreRoom(
        level=room.level,
        used_percent=round(100.0 * room.used_bytes / room.quota_bytes, 1),
        used_bytes=room.used_bytes,
        file_bytes=room.file_bytes,
        quota_bytes=room.quota_bytes,
    )


def _average(gauge: metric.Gauge) -> float | None:
    return gauge.sum / gauge.samples if gauge.samples else None


def metrics_view(found: metric.Metrics) -> schemas.Metrics:
    busy, memory = found.utilization, found.memory
    return schemas.Metrics(
        timeframe=found.timeframe,
        metrics=schemas.MetricValues(
            total_tasks=found.total_tasks,
            successful_tasks=found.successful_tasks,
            failed_tasks=found.failed_tasks,
            success_rate=format.percent(found.success_rate_percent),
            average_response_time=format.duration_or_none(found.average_response_s),
            peak_throughput=format.throughput(found.peak_tasks_per_minute),
            gpu_utilization=schemas.Utilization(
                average=format.percent(_average(busy)),
                peak=format.percent(busy.maximum) if busy.samples else None,
                minimum=format.percent(busy.minimum) if busy.samples else None,
            ),
            memory_usage=schemas.MemoryUsage(
                average=format.percent_text(_average(memory)),
                peak=format.percent_text(memory.maximum) if memory.samples else None,
                efficiency=format.percent(_average(found.useful_memory)),
            ),
            average_response_time_seconds=found.average_response_s,
            peak_tasks_per_minute=found.peak_tasks_per_minute,
        ),
    )


async def metrics(call: Call) -> Reply:
    timeframe = query_choice(call.query, "timeframe", tuple(metric.TIMEFRAMES)) or TIMEFRAME_DEFAULT
    found = await stale.read(call, command.GetMetrics(timeframe=timeframe))
    return stale.reply(call, metrics_view(found))


def _affected(moves: tuple[plan.Move, ...]) -> list[str]:
    """Every worker of a move, once, in the order of the moves."""
    seen: dict[str, None] = {}
    for move in moves:
        for worker_id in (move.from_worker, move.to_worker):
            if worker_id:
                seen[worker_id] = None
    return list(seen)


def plan_view(found: plan.Plan) -> schemas.RebalancePlan:
    predicted_s = sum(move.predicted_s for move in found.moves)
    return schemas.RebalancePlan(
        rebalance_id=found.rebalance_id,
        status=found.status,
        estimated_duration=format.span(predicted_s),
        affected_workers=_affected(found.moves),
        operations=[
            schemas.Operation(
                type=move.type,
                from_worker=move.from_worker,
                to_worker=move.to_worker,
                model=move.model,
                status=move.state,
                memory=format.memory(move.memory_bytes),
                memory_bytes=move.memory_bytes,
                predicted_seconds=round(move.predicted_s, 3),
                actual_seconds=move.actual_s,
                tasks_touched=move.tasks_touched,
                reason=move.reason,
            )
            for move in found.moves
        ],
        strategy=found.strategy,
        dry_run=found.dry_run,
        force=found.force,
        estimated_duration_seconds=round(predicted_s, 3),
        reasons=found.reasons,
        created_at=format.timestamp(found.created_at),
        finished_at=format.timestamp_or_none(found.finished_at),
    )


async def rebalance(call: Call) -> Reply:
    body = _decode_rebalance(call.body or b"{}")
    found = await call.api.cluster.call(
        command.Rebalance(strategy=body.strategy, force=body.force, dry_run=body.dry_run)
    )
    return Reply(_encode(plan_view(found)))


async def get_rebalance(call: Call) -> Reply:
    found = await call.api.cluster.call(command.GetPlan(rebalance_id=call.args[0]))
    return Reply(_encode(plan_view(found)))


ROUTES = (
    Route(
        "GET",
        "/cluster/status",
        status,
        "read",
        "Status of the cluster",
        schemas.ClusterStatus,
        query=(STALE,),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "GET",
        "/cluster/metrics",
        metrics,
        "read",
        "Measured performance over a timeframe",
        schemas.Metrics,
        query=(Param("timeframe", Literal["1h", "24h", "7d", "30d"], "Default 24h"), STALE),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "POST",
        "/cluster/rebalance",
        rebalance,
        "operate",
        "Move models to where they serve best",
        schemas.RebalancePlan,
        body=schemas.Rebalance,
        body_optional=True,
        errors=(409,),
    ),
    Route(
        "GET",
        "/cluster/rebalance/{rebalance_id}",
        get_rebalance,
        "read",
        "A rebalance and how far it has come",
        schemas.RebalancePlan,
        errors=(404,),
    ),
)
