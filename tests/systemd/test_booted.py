"""The service under a real systemd: installed, started, sandboxed, reloaded, drained, watched, removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.systemd import booted

pytestmark = pytest.mark.process

# The peer with a switch that makes it stuck.
_UP = """
import os, sys
from peer.cli import main
from peer.single_peer import SinglePeer

stuck = SinglePeer.stuck
SinglePeer.stuck = lambda self: "it" if os.path.exists("/mnt/stuck") else stuck(self)
sys.exit(main(sys.argv[1:]))
"""

_SCRIPT = """
/usr/bin/python3 -m venv --without-pip /opt/b
printf '%s\\n' /run/source SITE_PACKAGES > "$(echo /opt/b/lib/python3*)/site-packages/source.pth"
cd /
b() { /opt/b/bin/python -P -m peer "$@"; }
b --version || exit 1
said() { echo "$1=$(cat | tr '\\n' ' ')"; }
property() { systemctl show -p "$1" --value bitinglip; }

mkdir -p /etc/bitinglip /etc/credstore /etc/systemd/system/bitinglip.service.d
cat > /etc/bitinglip/bitinglip.yaml <<END
engine: {devices: [fake], fake: {tokens_per_s: 10}}
END
echo from-credstore > /etc/credstore/bitinglip.join.token
cat > /etc/systemd/system/bitinglip.service.d/test.conf <<END
[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart=/opt/b/bin/python /mnt/up.py up
TimeoutStopSec=1s
WatchdogSec=2s
RestartSec=100ms
END
b install-service --no-enable | said installed
setpriv --reuid bitinglip --regid bitinglip --init-groups /opt/b/bin/python -P -m peer \
  init --single --data-dir /var/lib/bitinglip >/dev/null; echo "init=$?"
systemctl start bitinglip; echo "start=$?"
pid=$(property MainPID)
property StatusText | said status
stat -c '%U %a' /var/lib/bitinglip | said state_directory
grep -E '^(Uid|CapBnd|NoNewPrivs|Seccomp):' /proc/$pid/status | tr '\\t' ' ' | said process
cat /run/credentials/bitinglip.service/join.token | said credential
nsenter --mount --target $pid sh -c 'touch /etc/x || touch /usr/x || ls -d /root/.[a-z]*' 2>/dev/null
echo "outside=$?"

export BITINGLIP_DATA_DIR=/var/lib/bitinglip
for _ in $(seq 100); do b workers --json | grep -q '"online":1' && break; sleep 0.1; done
b load echo >/dev/null 2>&1; echo "load=$?"
printf 'limits: {requests_per_minute: 5000}\\n' >> /etc/bitinglip/bitinglip.yaml
systemctl reload bitinglip; echo "reload=$?"
b submit echo "$(seq -s ' ' 40)" >/dev/null; echo "submit=$?"
for _ in $(seq 100); do b tasks --json | grep -q '"running"' && break; sleep 0.1; done
began=$(date +%s%N)
systemctl stop bitinglip
echo "stop_ms=$(( ($(date +%s%N) - began) / 1000000 ))"
property Result | said result

systemctl start bitinglip
b tasks --json | grep -o '"status":"[a-z]*"' | said tasks
touch /mnt/stuck
for _ in $(seq 150); do [ "$(property NRestarts)" -ge 1 ] && break; sleep 0.1; done
rm /mnt/stuck
for _ in $(seq 100); do [ "$(property ActiveState)" = active ] && break; sleep 0.1; done
property NRestarts | said restarts
property ActiveState | said active
journalctl --sync
journalctl -u bitinglip -o cat --no-pager -p warning | grep -c no_sign_of_life | said warnings
journalctl -u bitinglip -o cat --no-pager -p warning | grep -c '"leading"' | said infos_among_warnings
journalctl -u bitinglip -o cat --no-pager | grep -c 'Fatal Python error: Aborted' | said tracebacks
journalctl -u bitinglip -o cat --no-pager | grep -c '"reloaded"' | said reloads
rm -r /etc/systemd/system/bitinglip.service.d
b install-service --uninstall >/dev/null; echo "uninstall=$?"
systemctl is-active bitinglip | said after
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What the script saw, by name."""
    if why := booted.missing() or booted.unseen():
        pytest.skip(why)
    folder: Path = tmp_path_factory.mktemp("booted")
    folder.chmod(0o755)
    (folder / "up.py").write_text(_UP)
    printed = booted.run(folder, _SCRIPT.replace("SITE_PACKAGES", booted.site_packages()))
    print(printed)
    return {name: value.strip() for name, _, value in (line.partition("=") for line in printed.splitlines())}


def test_it_is_installed_and_starts(seen: Mapping[str, str]) -> None:
    assert "wrote: /etc/systemd/system/bitinglip.service" in seen["installed"]
    assert "bitinglip.yaml" not in seen["installed"]  # there was one
    assert seen["init"] == "0"  # by the service's user, before the first start
    assert (seen["start"], seen["status"]) == ("0", "serving at http://127.0.0.1:8000")


def test_its_sandbox(seen: Mapping[str, str]) -> None:
    assert seen["state_directory"] == "bitinglip 700"
    assert "Uid: 0" not in seen["process"]
    assert "CapBnd: 0000000000000000" in seen["process"]
    assert "NoNewPrivs: 1" in seen["process"]
    assert "Seccomp: 2" in seen["process"]
    assert seen["outside"] != "0"


def test_a_credential_reaches_it(seen: Mapping[str, str]) -> None:
    assert seen["credential"] == "from-credstore"


def test_reload(seen: Mapping[str, str]) -> None:
    assert (seen["reload"], seen["reloads"]) == ("0", "1")


def test_a_stop_drains_for_longer_than_its_time_limit(seen: Mapping[str, str]) -> None:
    assert (seen["load"], seen["submit"]) == ("0", "0")
    assert seen["result"] == "success"
    assert 1_500 < int(seen["stop_ms"]) < 20_000  # the limit is 1 s, the task takes about 4 s
    assert seen["tasks"] == '"status":"completed"'


def test_the_watchdog_ends_one_that_is_stuck_and_it_starts_again(seen: Mapping[str, str]) -> None:
    assert (seen["restarts"], seen["active"]) == ("1", "active")
    assert seen["tracebacks"] == "1"


def test_lines_have_their_priority(seen: Mapping[str, str]) -> None:
    assert int(seen["warnings"]) >= 1
    assert seen["infos_among_warnings"] == "0"


def test_uninstall_stops_it(seen: Mapping[str, str]) -> None:
    assert (seen["uninstall"], seen["after"]) == ("0", "inactive")
