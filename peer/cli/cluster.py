"""`bitinglip status`, `workers`, `restart`, `metrics`, `rebalance`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from peer.cli.common import client_options, emit, json_option, pairs, poll_pause, say, shown, table
from peer.cli.exits import CliError, Exit
from peer.cli.tasks import path_part

if TYPE_CHECKING:
    from peer.cli.client import Client

RESTART_S_MAX = 180.0


@click.command()
@json_option
@client_options
def status(client: Client, as_json: bool) -> None:
    """Show the cluster's status."""
    try:
        answer = client.get("/cluster/status", {"stale": "ok"})
    except CliError as error:
        if error.code == Exit.BUSY and not as_json:
            with suppress(CliError):  # the first one is what there is to say
                _show_gossip(client)
        raise
    if as_json:
        emit(answer)
        return
    found = answer.data
    rows = [
        ("cluster", found["cluster_id"]),
        ("status", found["status"]),
        ("workers", f"{found['active_workers']} of {found['total_workers']} active"),
        ("tasks", f"{found['queued_tasks']} queued, {found['running_tasks']} running"),
        ("utilization", f"{found['gpu_utilization']}%"),
        ("memory", f"{found['available_memory']} of {found['total_memory']} free"),
        ("uptime", found["uptime"]),
        *([("leader", f"{found['leader']}, epoch {found['epoch']}")] if found.get("leader") else []),
        *([("voters", _voters(found["voters"]))] if found.get("voters") else []),
        *([("store", f"{found['store']['used_percent']}% used")] if found.get("store") else []),
        ("peer", client.target.url),
        ("outlook", found.get("outlook")),
    ]
    rows += [("because", reason) for reason in found.get("reasons", ())]
    pairs(rows)
    if found.get("stale_seconds") is not None:
        say(f"\nno leader can be reached; that was so {found['stale_seconds']:.0f} s ago. By gossip:")
        _show_gossip(client)


def _show_gossip(client: Client) -> None:
    """What is known without a leader."""
    found = client.get("/cluster/gossip").data["members"]
    rows = (
        (
            each["peer_id"],
            each["status"],
            each["role"],
            each["voter"],
            None if each["workers"] is None else f"{each['workers_up']} of {each['workers']} up",
            None if each["running"] is None else f"{each['running']} of {each['slots']}",
        )
        for each in found
    )
    table(("HOST", "STATUS", "SAYS IT IS", "VOTES", "WORKERS", ">SLOTS IN USE"), rows, empty="gossip shows nobody")


def _voters(found: list[dict[str, Any]]) -> str:
    return ", ".join(
        each["peer_id"] + " (learner)" * each["learner"] + " (away)" * (not each["linked"]) for each in found
    )


@click.command()
@click.argument("worker_id", required=False)
@click.option("--status", type=click.Choice(["online", "offline", "busy", "error"]))
@click.option("--gpu-type", metavar="TEXT", help="Only GPUs of this type.")
@json_option
@client_options
def workers(
    client: Client, worker_id: str | None, status: str | None, gpu_type: str | None, as_json: bool
) -> None:
    """List workers (one per device), or show one."""
    if worker_id is not None:
        answer = client.get(f"/workers/{path_part(worker_id)}")
        emit(answer) if as_json else _show_worker(answer.data)
        return
    answer = client.get("/workers", {"status": status, "gpu_type": gpu_type})
    if as_json:
        emit(answer)
        return
    found = answer.data["workers"]
    columns = ("WORKER", "STATUS", "DEVICE", "MEMORY", ">TEMP", ">BUSY", ">TASKS", "MODELS")
    table(columns, (_worker_row(worker) for worker in found), empty="no workers")
    for worker in found:
        if worker.get("message"):
            say(f"{worker['worker_id']}: {worker['message']}")


def _worker_row(worker: dict[str, Any]) -> tuple[Any, ...]:
    gpu = worker["gpu_info"]
    heat, busy = gpu["temperature"], gpu["utilization"]
    return (
        worker["worker_id"],
        worker["status"],
        gpu["model"],
        f"{shown(gpu['memory_used'])} of {shown(gpu['memory_total'])}",
        None if heat is None else f"{heat:g}°C",
        None if busy is None else f"{busy:g}%",
        worker["current_tasks"],
        worker["loaded_models"],
    )


def _show_worker(worker: dict[str, Any]) -> None:
    gpu, system = worker["gpu_info"], worker["system_info"]
    history, metrics_ = worker["task_history"], worker["metrics"]
    pairs(
        [
            ("worker", worker["worker_id"]),
            ("status", worker["status"]),
            *([("message", worker["message"])] if worker.get("message") else []),
            ("device", gpu["model"]),
            ("memory", f"{shown(gpu['memory_used'])} of {shown(gpu['memory_total'])} used"),
            ("temperature", gpu["temperature"]),
            ("utilization", gpu["utilization"]),
            ("driver", gpu["driver_version"]),
            ("processor", system["cpu"]),
            ("main memory", f"{shown(system['ram_used'])} of {shown(system['ram_total'])} used"),
            ("system", system["os"]),
            ("completed today", history["completed_today"]),
            ("duration, average", history["average_duration"]),
            ("success rate", history["success_rate"]),
            ("tasks per hour", metrics_["tasks_per_hour"]),
            ("response, average", metrics_["average_response_time"]),
            ("error rate", metrics_["error_rate"]),
        ]
    )
    print()
    rows = (
        (model["name"], model["memory_usage"], model["load_time"], model["last_used"])
        for model in worker["loaded_models"]
    )
    table(("MODEL", ">MEMORY", ">LOADED IN", "LAST USED"), rows, empty="no models loaded")


@click.command()
@click.argument("worker_id")
@click.option("--wait", is_flag=True, help="Wait until it serves again.")
@json_option
@client_options
def restart(client: Client, worker_id: str, wait: bool, as_json: bool) -> None:
    """Restart a worker's engine. Its running tasks are queued again."""
    answer = client.post(f"/workers/{path_part(worker_id)}/restart", None)
    began = time.monotonic()
    if as_json:
        emit(answer)
    else:
        downtime = shown(answer.data["estimated_downtime"])
        print(f"{shown(answer.data['message'])}: {downtime} of downtime, estimated")
    if wait:
        _await_worker(client, worker_id)
        say(f"{worker_id} serves again after {time.monotonic() - began:.1f} s")


def _await_worker(client: Client, worker_id: str) -> None:
    began = time.monotonic()
    while (elapsed_s := time.monotonic() - began) < RESTART_S_MAX:
        time.sleep(poll_pause(elapsed_s))
        found = client.get(f"/workers/{path_part(worker_id)}").data
        if found["status"] in ("online", "busy"):
            return
    raise CliError(
        f"{worker_id} does not serve again after {RESTART_S_MAX:.0f} s",
        Exit.FAILED,
        f"`bitinglip workers {worker_id}` says why",
    )


@click.command()
@click.option("--timeframe", type=click.Choice(["1h", "24h", "7d", "30d"]), default="24h", show_default=True)
@json_option
@client_options
def metrics(client: Client, timeframe: str, as_json: bool) -> None:
    """Show measured performance."""
    answer = client.get("/cluster/metrics", {"timeframe": timeframe})
    if as_json:
        emit(answer)
        return
    found = answer.data["metrics"]
    gpu, memory = found["gpu_utilization"], found["memory_usage"]
    pairs(
        [
            ("timeframe", answer.data["timeframe"]),
            ("tasks", found["total_tasks"]),
            ("successful", found["successful_tasks"]),
            ("failed", found["failed_tasks"]),
            ("success rate", _percent(found["success_rate"])),
            ("response, average", found["average_response_time"]),
            ("throughput, peak", found["peak_throughput"]),
            ("utilization, average", _percent(gpu["average"])),
            ("utilization, peak", _percent(gpu["peak"])),
            ("utilization, minimum", _percent(gpu["minimum"])),
            ("memory, average", memory["average"]),
            ("memory, peak", memory["peak"]),
            ("memory, efficiency", _percent(memory["efficiency"])),
        ]
    )


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:g}%"


@click.command()
@click.option(
    "--strategy",
    type=click.Choice(["memory_optimized", "load_balanced", "latency_optimized"]),
    default="memory_optimized",
    show_default=True,
)
@click.option("--force", is_flag=True, help="Also move models that are at work.")
@click.option("--dry-run", is_flag=True, help="Only show the plan.")
@json_option
@client_options
def rebalance(client: Client, strategy: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Move models to where they serve best."""
    answer = client.post("/cluster/rebalance", {"strategy": strategy, "force": force, "dry_run": dry_run})
    if as_json:
        emit(answer)
        return
    plan = answer.data
    duration = shown(plan["estimated_duration"])
    print(f"{shown(plan['rebalance_id'])} {shown(plan['status'])}, {duration} estimated")
    rows = (
        (
            operation["type"].removeprefix("model_"),
            operation["model"],
            operation["from_worker"],
            operation["to_worker"],
            operation.get("memory"),
            operation.get("reason"),
        )
        for operation in plan["operations"]
    )
    table(("MOVE", "MODEL", "FROM", "TO", ">MEMORY", "BECAUSE"), rows, empty="nothing to move")
    for reason in plan.get("reasons", ()):
        print(shown(reason))
