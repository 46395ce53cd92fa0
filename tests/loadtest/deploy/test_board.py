"""The deployment's files: made from code, current, and in accord with each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.deploy.__main__ import FOLDER, MADE
from loadtest.deploy.board import SOURCE_UID
from loadtest.deploy.panels import PANELS, ROWS, Needs, filled

BOARD = json.loads((FOLDER / "grafana/boards/pareto.json").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_from_code_is_current(name: str) -> None:
    assert (FOLDER / name).read_text() == MADE[name](), "run: python -m loadtest.deploy"


def test_the_board_has_every_panel_once() -> None:
    shown = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in shown] == [panel.title for panel in PANELS]
    assert [row["title"] for row in BOARD["panels"] if row["type"] == "row"] == list(ROWS)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    for panel, made in zip(PANELS, shown, strict=True):
        assert [target["expr"] for target in made["targets"]] == [query.expr for query in panel.queries]
        assert len({target["refId"] for target in made["targets"]}) == len(made["targets"])
        assert made["description"]


def test_no_two_panels_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_variable_of_a_query_is_one_of_the_board() -> None:
    names = {variable["name"] for variable in BOARD["templating"]["list"]}
    for panel in PANELS:
        for query in panel.queries:
            used = set(re.findall(r"\$(\w+)", query.expr))
            assert used <= names | {"__rate_interval"}
            assert used & {"instance", "run"}, "a board of several servers is of use only where they can be told apart"
            assert "$" not in filled(query.expr, "1m")
            # What the legend names is what the query groups by.
            groups = re.findall(r"by \(([^)]*)\)", query.expr)
            assert set(re.findall(r"{{(\w+)}}", query.legend)) <= set(re.split(r", ", groups[0])), query.legend


def test_all_that_a_reader_is_told_to_look_for_is_needed_somewhere() -> None:
    assert {query.needs for panel in PANELS for query in panel.queries} == set(Needs)


def test_grafana_finds_its_source_and_its_board() -> None:
    (source,) = documents("grafana/provisioning/datasources/prometheus.yml")[0]["datasources"]
    assert source["uid"] == SOURCE_UID
    (provider,) = documents("grafana/provisioning/dashboards/pareto.yml")[0]["providers"]
    services = documents("compose.yaml")[0]["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./grafana/boards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_what_is_published_is_published_on_loopback_only() -> None:
    services = documents("compose.yaml")[0]["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    for name in ("server", "prometheus", "grafana", "loadtest"):
        for document in documents(f"kubernetes/{name}.yaml"):
            if document["kind"] == "Service":
                assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
            assert document["kind"] != "Ingress"


def test_prometheus_scrapes_what_there_is_in_compose_and_on_kubernetes() -> None:
    jobs = documents("prometheus/prometheus.yml")[0]["scrape_configs"]
    services = documents("compose.yaml")[0]["services"]
    cluster = {
        document["metadata"]["name"]: {port["port"] for port in document["spec"]["ports"]}
        for name in ("server", "prometheus", "grafana", "loadtest")
        for document in documents(f"kubernetes/{name}.yaml")
        if document["kind"] == "Service"
    }
    for job in jobs:
        host, port = job["static_configs"][0]["targets"][0].split(":")
        if host != "127.0.0.1":
            assert host in services
            assert int(port) in cluster[host]


def test_files_that_are_mounted_are_there() -> None:
    services = documents("compose.yaml")[0]["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (FOLDER / source).exists(), volume
    kustomization = documents("kustomization.yaml")[0]
    maps = {each["name"] for each in kustomization["configMapGenerator"]}
    for name in (*kustomization["resources"], *(f for m in kustomization["configMapGenerator"] for f in m["files"])):
        assert (FOLDER / name).is_file(), name
    used = set()
    for name in kustomization["resources"]:
        for document in documents(name):
            if document["kind"] == "Deployment":
                pod = document["spec"]["template"]["spec"]
                used |= {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
                volumes = {volume["name"] for volume in pod["volumes"]}
                assert {mount["name"] for c in pod["containers"] for mount in c["volumeMounts"]} == volumes
    assert used == maps


def test_images_of_compose_and_kubernetes_are_the_same() -> None:
    services = documents("compose.yaml")[0]["services"]
    for name in ("prometheus", "grafana"):
        (deployment,) = (each for each in documents(f"kubernetes/{name}.yaml") if each["kind"] == "Deployment")
        assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == services[name]["image"]
    targets = set(re.findall(r"^FROM .* AS (\w+)", (FOLDER.parents[1] / "Dockerfile").read_text(), re.MULTILINE))
    for name in ("compose.yaml", "compose.gpu.yaml"):
        build = documents(name)[0]["services"]["server"]["build"]
        assert (FOLDER / build["context"]).resolve() == Path(__file__).parents[3]
        assert build["target"] in targets
