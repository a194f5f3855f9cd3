//! The text format of Prometheus. Pure.

use std::fmt::{Display, Write};

use agent_api::CapsuleState;
use api::CapsuleId;

use super::read::Reading;
use crate::admission::Room;

const MIB: u64 = 1 << 20;

/// The host, how many capsules are in each state, and the last reading of each that runs.
pub fn write(room: &Room, states: &[CapsuleState], capsules: &[(CapsuleId, Reading)]) -> String {
    let mut text = String::new();
    let (memory, vcpus, disk) = (room.memory_mib, room.vcpus, room.disk_mib);
    for (name, help, value) in [
        ("wrenn_host_memory_promised_bytes", "Memory promised to capsules that run.", memory.0 * MIB),
        ("wrenn_host_memory_limit_bytes", "Memory that may be promised.", memory.1.saturating_mul(MIB)),
        ("wrenn_host_vcpus_promised", "Virtual processors promised to capsules that run.", vcpus.0),
        ("wrenn_host_vcpus_limit", "Virtual processors that may be promised.", vcpus.1),
        ("wrenn_host_disk_used_bytes", "What is taken of the file system of disks and snapshots.", disk.0 * MIB),
        ("wrenn_host_disk_limit_bytes", "What may be taken of it.", disk.1 * MIB),
    ] {
        family(&mut text, name, "gauge", help, [("", value)]);
    }
    let named = [
        (CapsuleState::Starting, "starting"),
        (CapsuleState::Running, "running"),
        (CapsuleState::Pausing, "pausing"),
        (CapsuleState::Paused, "paused"),
        (CapsuleState::Resuming, "resuming"),
        (CapsuleState::Stopping, "stopping"),
    ];
    let counts = named
        .map(|(state, name)| (format!("{{state=\"{name}\"}}"), states.iter().filter(|other| **other == state).count()));
    family(&mut text, "wrenn_capsules", "gauge", "Capsules on this host.", counts);
    let seconds = |reading: &Reading| reading.cpu_usec as f64 / 1e6;
    let name = |id: &CapsuleId| format!("{{capsule=\"{id}\"}}");
    family(
        &mut text,
        "wrenn_capsule_cpu_seconds_total",
        "counter",
        "Time that processors worked for it since it was started or last resumed.",
        capsules.iter().map(|(id, reading)| (name(id), seconds(reading))),
    );
    type Of = fn(&Reading) -> u64;
    let families: [(&str, &str, &str, Of); 4] = [
        ("memory_bytes", "gauge", "Memory of its processes, shared pages in parts.", |reading| reading.memory),
        ("disk_bytes", "gauge", "What its files take and share with no others.", |reading| reading.disk),
        ("sent_bytes_total", "counter", "What its guest sent since it was started or last resumed.", |reading| {
            reading.sent
        }),
        ("received_bytes_total", "counter", "What was sent to its guest since it was started or last resumed.", |of| {
            of.received
        }),
    ];
    for (suffix, kind, help, of) in families {
        let values = capsules.iter().map(|(id, reading)| (name(id), of(reading)));
        family(&mut text, &format!("wrenn_capsule_{suffix}"), kind, help, values);
    }
    text
}

fn family<L: Display, V: Display>(
    text: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, V)>,
) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (labels, value) in values {
        let _ = writeln!(text, "{name}{labels} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_named_once_and_every_line_has_a_value() {
        let id = CapsuleId::random();
        let room = Room { memory_mib: (512, 2048), vcpus: (1, 32), disk_mib: (10, 20) };
        let reading = Reading { unix_ms: 1, cpu_usec: 1_500_000, memory: 2, disk: 3, sent: 4, received: 5 };
        let text = write(&room, &[CapsuleState::Running, CapsuleState::Paused], &[(id, reading)]);
        for line in [
            "wrenn_host_memory_promised_bytes 536870912".to_owned(),
            "wrenn_host_vcpus_limit 32".into(),
            "wrenn_capsules{state=\"running\"} 1".into(),
            "wrenn_capsules{state=\"starting\"} 0".into(),
            format!("wrenn_capsule_cpu_seconds_total{{capsule=\"{id}\"}} 1.5"),
            format!("wrenn_capsule_received_bytes_total{{capsule=\"{id}\"}} 5"),
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        let mut names: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!((names.len(), text.ends_with('\n')), (count, true));
    }
}
