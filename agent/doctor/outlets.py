"""Where figures go: the metrics port, an OTLP back end, tables and reports; and what all may cost."""

from __future__ import annotations

import errno
import socket
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

from stagescope import settings
from stagescope.agent.api.address import default_metrics_address
from stagescope.agent.api.client import AgentClient
from stagescope.agent.doctor.environment import Environment
from stagescope.agent.doctor.finding import NO, OK, WARN, Finding
from stagescope.agent.overhead import BUDGET_VARIABLE, SHEDS, budget
from stagescope.errors import StagescopeError, UsageError
from stagescope.recorder.spool import SOCKET_NAME

CONNECT_S: Final = 1.0
OTLP_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
GRPC_PORT: Final = 4317
LOAD_NEEDS: Final = ("aiohttp", "duckdb", "ibis", "pyarrow", "rich")


def metrics_port(around: Environment) -> Finding:
    """Is the port of /metrics free, or who has it?"""
    try:
        host, port = default_metrics_address(around.environment)
    except UsageError as wrong:
        return Finding(NO, str(wrong), facts={"free": False})
    facts: dict[str, Any] = {"host": host, "port": port, "free": True, "holder": None}
    try:
        socket.create_server((host, port)).close()
    except OSError as problem:
        facts["free"] = False
        if problem.errno != errno.EADDRINUSE:
            text = f"{host}:{port} cannot be listened on: {problem.strerror}"
            do = ("stagescope agent --metrics-port 127.0.0.1:9464",)
            return Finding(WARN, text, do, facts=facts)
        return _taken(around, facts)
    return Finding(OK, f"{host}:{port} is free for /metrics", facts=facts)


def _taken(around: Environment, facts: dict[str, Any]) -> Finding:
    facts["holder"] = holder = _listener(facts["port"])
    where = f"{facts['host']}:{facts['port']}"
    try:
        ours = AgentClient(around.spool / SOCKET_NAME, timeout_s=CONNECT_S).health()["pid"]
    except (StagescopeError, KeyError):
        ours = None
    if holder and holder["pid"] == ours:
        return Finding(OK, f"{where}: this spool's agent serves /metrics", facts=facts)
    who = f"{holder['name']} pid {holder['pid']}" if holder else "a process of another user"
    do = ("stagescope agent --metrics-port 0 (it says which port it took)",)
    return Finding(WARN, f"{where} is held by {who}: no /metrics there", do, facts=facts)


def _listener(port: int) -> dict[str, Any] | None:
    import psutil

    for one in psutil.net_connections("tcp"):
        listens = one.status == psutil.CONN_LISTEN and one.pid
        if listens and one.laddr and one.laddr.port == port:
            return {"pid": one.pid, "name": psutil.Process(one.pid).name()}
    return None


def otlp(around: Environment) -> Finding:
    """Does the back end for spans listen?"""
    variable = next((name for name in OTLP_VARIABLES if around.environment.get(name)), None)
    if variable is None:
        text = "no back end named: no spans in Jaeger or Tempo; load runs have them in their folder"
        do = ("export OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318",)
        return Finding(WARN, text, do, facts={"endpoint": None})
    url = urlsplit(around.environment[variable])
    try:
        host, port = url.hostname, url.port or (443 if url.scheme == "https" else GRPC_PORT)
    except ValueError:
        host, port = None, 0
    if not host:
        text = f"{variable} is no URL"
        return Finding(NO, text, (f"export {variable}=http://collector:4318",))
    facts = {"endpoint": f"{host}:{port}", "variable": variable}  # no more: it may hold a password
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as problem:
        why = problem.strerror or f"no answer within {CONNECT_S:g} s"
        text = f"{host}:{port} ({variable}) does not listen: {why}"
        return Finding(NO, text, ("start the collector, or mend the address",), facts=facts)
    return Finding(OK, f"{host}:{port} listens ({variable})", facts=facts)


def load(around: Environment) -> Finding:
    """Is what `stagescope load` and `report` need installed?"""
    missing = [name for name in LOAD_NEEDS if find_spec(name) is None]
    facts = {"missing": missing}
    if missing:
        text = f"no load runs and reports from here: {', '.join(missing)} not installed"
        return Finding(WARN, text, ("pip install 'stagescope[load]'",), facts=facts)
    return Finding(OK, "stagescope load, report: installed", facts=facts)


def own_cost(around: Environment) -> Finding:
    """What the samplers may cost, what they do, and what is shed for it."""
    if wrong := settings.AGENT_BUDGET.problem(around.environment):
        return Finding(NO, wrong)
    share = budget(around.environment)
    text = f"samplers may use {100 * share:g} % of one core ({BUDGET_VARIABLE})"
    facts: dict[str, Any] = {"budget": share if share < float("inf") else None}
    try:
        counted = AgentClient(around.spool / SOCKET_NAME, timeout_s=2 * CONNECT_S).counters()
    except StagescopeError:
        return Finding(OK, text, facts=facts)
    level, used = int(counted.get("governor_level", 0)), counted.get("governor_share", 0.0)
    facts |= {"level": level, "share": used}
    told = f"{text}; they use {100 * used:.2f} %"
    if not level:
        return Finding(OK, told, facts=facts)
    shed = ", ".join(SHEDS[:level])
    do = (f"export {BUDGET_VARIABLE}=0.02, or fewer samplers (--samplers)",)
    return Finding(WARN, f"{told}, so the governor has shed: {shed}", do, facts=facts)


def configuration(around: Environment) -> Finding:
    """Which `STAGESCOPE_*` variables are set here, and what is wrong with them?"""
    chosen = {
        name: value
        for name, value in around.environment.items()
        if name.startswith(settings.PREFIX)
    }
    wrong = list(settings.problems(around.environment))
    facts = {"set": chosen, "wrong": wrong}
    if wrong:
        return Finding(WARN, "; ".join(wrong), ("see docs/configuration.md",), facts=facts)
    told = ", ".join(
        f"{name}={settings.printable(value)}" for name, value in sorted(chosen.items())
    )
    return Finding(OK, told or "no STAGESCOPE_* variable is set: the defaults count", facts=facts)
