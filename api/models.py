"""Models: the catalogue, and which worker has or is to have them."""

from __future__ import annotations

import msgspec

from api import format, schemas, stale
from api.decode import BodyDecoder
from api.http import Call, Reply, Route
from api.stale import STALE, STALE_HEADER
from api.workers import REPLICA_SHOWN
from peer.state import command
from peer.state.model import Replica
from peer.state.task import PRIORITY_NAMES

_encode = msgspec.json.Encoder().encode
_decode_assign = BodyDecoder(schemas.AssignModel)
_decode_unload = BodyDecoder(schemas.UnloadModel)


def priority_number(priority: str | int) -> int:
    return PRIORITY_NAMES[priority] if isinstance(priority, str) else priority


async def assign(call: Call) -> Reply:
    body = _decode_assign(call.body)
    call.api.model(body.model_name)
    reply: command.AssignReply = await call.api.cluster.call(
        command.AssignModel(
            model_name=body.model_name,
            worker_ids=tuple(dict.fromkeys(body.worker_ids)),
            preload=body.preload,
            priority=priority_number(body.priority),
        )
    )
    return Reply(
        _encode(
            schemas.ModelAssigned(
                assignment_id=reply.assignment_id,
                model_name=reply.model_name,
                assignments=[
                    schemas.PlacedModel(
                        worker_id=placed.worker_id,
                        status=placed.status,
                        estimated_time=format.estimate(placed.estimated_s),
                        estimated_seconds=round(placed.estimated_s, 3),
                        reason=placed.reason,
                    )
                    for placed in reply.placed
                ],
            )
        )
    )


async def unload(call: Call) -> Reply:
    body = _decode_unload(call.body)
    reply: command.UnloadReply = await call.api.cluster.call(
        command.UnloadModel(
            model_name=body.model_name, worker_ids=tuple(dict.fromkeys(body.worker_ids)), force=body.force
        )
    )
    return Reply(
        _encode(
            schemas.UnloadStarted(
                message="Model unload initiated",
                model_name=reply.model_name,
                affected_workers=reply.affected_workers,
                requeued_tasks=reply.requeued_tasks,
            )
        )
    )


def _present(replica: Replica) -> schemas.AssignedModel:
    return schemas.AssignedModel(
        name=replica.model_name,
        status=REPLICA_SHOWN[replica.state],
        memory_usage=format.memory(replica.memory_bytes) if replica.memory_bytes else None,
        load_time=format.estimate(replica.load_s) if replica.load_s else None,
        memory_usage_bytes=replica.memory_bytes or None,
        load_time_seconds=round(replica.load_s, 3) if replica.load_s else None,
        progress=round(100 * replica.done / replica.total, 1) if replica.total else None,
        stage=replica.stage or None,
        stage_done=replica.done if replica.stage else None,
        stage_total=replica.total or None,
        error=replica.error,
    )


def _wished(model_name: str) -> schemas.AssignedModel:
    return schemas.AssignedModel(
        name=model_name,
        status="assigned",
        memory_usage=None,
        load_time=None,
        memory_usage_bytes=None,
        load_time_seconds=None,
        progress=None,
        stage=None,
        stage_done=None,
        stage_total=None,
        error="",
    )


def worker_assignments(view: command.AssignmentView) -> schemas.WorkerAssignments:
    """What is on the worker, then what is only wished there."""
    present = [_present(replica) for replica in view.replicas]
    names = {model.name for model in present}
    missing = dict.fromkeys(wish.model_name for wish in view.wishes if wish.model_name not in names)
    return schemas.WorkerAssignments(
        worker_id=view.worker_id, models=present + [_wished(name) for name in missing]
    )


async def assignments(call: Call) -> Reply:
    views: tuple[command.AssignmentView, ...] = await stale.read(call, command.ListAssignments())
    return stale.reply(call, schemas.AssignmentList(assignments=[worker_assignments(view) for view in views]))


async def list_models(call: Call) -> Reply:
    views: tuple[command.ModelView, ...] = await stale.read(call, command.ListModels())
    models = [
        schemas.CatalogueModel(
            name=view.model.name,
            family=view.model.family,
            source=view.model.source,
            context=view.model.context,
            size=format.memory(view.model.size_bytes) if view.model.size_bytes else None,
            size_bytes=view.model.size_bytes,
            description=view.model.description,
            license=view.model.license,
            task_types=view.model.task_types,
            replicas=[
                schemas.ModelReplica(
                    worker_id=replica.worker_id,
                    status=REPLICA_SHOWN[replica.state],
                    slots=replica.slots,
                )
                for replica in view.replicas
            ],
            queued_tasks=view.queued,
        )
        for view in views
    ]
    return stale.reply(call, schemas.ModelList(models=models, total=len(models)))


ROUTES = (
    Route(
        "GET",
        "/models",
        list_models,
        "read",
        "The catalogue of models",
        schemas.ModelList,
        query=(STALE,),
        response_headers=(STALE_HEADER,),
    ),
    Route(
        "POST",
        "/models/assign",
        assign,
        "operate",
        "Assign a model to workers",
        schemas.ModelAssigned,
        body=schemas.AssignModel,
        errors=(404, 409),
    ),
    Route(
        "POST",
        "/models/unload",
        unload,
        "operate",
        "Unload a model from workers",
        schemas.UnloadStarted,
        body=schemas.UnloadModel,
        errors=(404, 409),
    ),
    Route(
        "GET",
        "/models/assignments",
        assignments,
        "read",
        "Models on workers, and those that are to be",
        schemas.AssignmentList,
        query=(STALE,),
        response_headers=(STALE_HEADER,),
    ),
)
