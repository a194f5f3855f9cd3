//! Power cuts under the record of a capsule, as the agent writes it: what was committed is there afterwards, or what was
//! recorded after that, and never nothing.

#![expect(clippy::print_stderr, reason = "a failed run is understood by its seed")]

use std::fs::File;
use std::io::{self, Write};

use agent::capsule::Spec;
use agent::capsule::record::Journal;
use api::CapsuleId;
use api::egress::Policy;

use crate::power::device::Power;
use crate::world::{MIB, Random};

/// How often the power goes.
const CUTS: usize = 24;
/// Within how many requests to the disk below: of several rounds.
const WITHIN: u64 = 120;

#[test]
fn a_record_that_was_committed_is_not_lost_with_what_is_recorded_after_it() {
    let seed = std::env::var("WRENN_SEED").map_or(u64::from(std::process::id()), |seed| seed.parse().unwrap());
    eprintln!("WRENN_SEED={seed}");
    let mut random = Random(seed);
    let mut power = Power::new(320 * MIB, &["mkfs.xfs", "-q", "-m", "reflink=1"]);
    let dir = power.path().join("capsule");
    let spec = Spec {
        id: CapsuleId::random(),
        image: "minimal".into(),
        vcpus: 1,
        memory_mib: 1,
        disk_mib: 1,
        timeout_sec: 0,
        default_env: Default::default(),
        template_id: String::new(),
    };
    Journal::create(dir.clone(), spec, Policy::default(), String::new()).unwrap().commit(|_| {}).unwrap();
    let mut committed = 0;
    for cut in 0..CUTS {
        let found = Journal::open(dir.clone()).unwrap_or_else(|error| panic!("cut {cut}: {error}"));
        let mut journal = found.expect("it was committed");
        assert!(journal.record().generation >= committed, "cut {cut}");
        power.cut_after(random.below(WITHIN));
        let mut round = || {
            journal.commit(|record| record.generation += 1)?;
            committed = journal.record().generation;
            journal.update(|record| record.vmm = None)?;
            // What somebody else makes durable takes the rename along.
            let mut other = File::create(power.path().join("other"))?;
            other.write_all(b"other").and_then(|()| other.sync_all())
        };
        let error: io::Error = loop {
            if let Err(error) = round() {
                break error;
            }
        };
        assert!(power.is_off(), "cut {cut}: {error}");
        power.restore(&mut random);
    }
    assert!(committed > 0, "nothing was ever committed");
}
