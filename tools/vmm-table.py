#!/usr/bin/env python3
"""Writes the table of docs/vmm.md: what the suite demands, and what came of it on each VMM.

vmm-table.py DOC DIFFERENCES NAME=JUNIT[,JUNIT]...    replaces what is between the two marks in DOC; a column for each
NAME. The last one's results decide which rows there are, besides those of DIFFERENCES.
"""

import sys
import xml.etree.ElementTree as xml

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# Suites of which every VMM has its own results, in the order of the table.
SUITES = ["firecracker-qemu::conformance", "vmm::it", "agent::it", "end-to-end::cli", "end-to-end::lifecycle",
          "end-to-end::ports", "end-to-end::proxy", "end-to-end::pty", "end-to-end::recovery"]


def results(paths):
    found = {}
    for path in paths.split(","):
        for case in xml.parse(path).getroot().iter("testcase"):
            failed = case.find("failure") is not None or case.find("error") is not None
            found[case.get("classname"), case.get("name")] = "**no**" if failed else "yes"
    return found


def differences(path):
    with open(path) as file:
        lines = [line for line in file if not line.startswith("#")]
    return dict(line.strip().split(" ", 1) for line in lines)


def main(doc, known, *columns):
    names, paths = zip(*(column.split("=", 1) for column in columns))
    tables = [results(path) for path in paths]
    known = differences(known)
    # Without what is a part of a test: programs that others start, and what they stand on.
    rows = {row for row in tables[-1] if row[0] in SUITES and "host::" not in row[1] and "::be_" not in row[1]}
    for table in tables[:-1]:
        rows |= {row for row in table if row[0] in SUITES and row[1] in known}
    rows = list(rows)
    rows.sort(key=lambda row: (SUITES.index(row[0]), row[1]))
    lines = ["| | | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    last = None
    for row in rows:
        suite, test = row
        group, _, behaviour = test.rpartition("::")
        crate, _, binary = suite.partition("::")
        group = {"conformance": f"VMM: {group}", "it": f"{crate}: {group}"}.get(binary, f"{crate}: {binary}")
        missing = "differs[^" + str(list(known).index(test) + 1) + "]" if test in known else "not run"
        cells = " | ".join(table.get(row, missing) for table in tables)
        lines.append(f"| {group if group != last else ''} | {behaviour.replace('_', ' ')} | {cells} |")
        last = group
    lines += [""] + [f"[^{number}]: {reason}" for number, reason in enumerate(known.values(), 1)]
    with open(doc) as file:
        text = file.read()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with open(doc, "w") as file:
        file.write(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


main(*sys.argv[1:])
