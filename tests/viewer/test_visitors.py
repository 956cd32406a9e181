"""Many visitors of the viewer: no browser is needed for that."""

from __future__ import annotations

import http.client
from pathlib import Path
from urllib.parse import urlsplit


def resident_mb(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_a_page_that_opens_the_viewer_again_and_again_fills_nothing(server):
    """250 visitors who never open a connection: the first ones get the page, the others are told to wait."""
    address, pid = server
    before, ends = resident_mb(pid), []
    for _ in range(250):
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read()
        ends.append(response.status)
        connection.close()
    assert set(ends) == {200, 503} and ends.count(200) < 100
    assert resident_mb(pid) - before < 300
