use proptest::prelude::*;

use super::*;

fn state(device: Vec<u8>) -> State {
    State {
        header: Header {
            qemu_version: "7.2.22".to_owned(),
            tsc_khz: 2_600_000,
            machine: MachineConfig::default(),
            drives: Vec::new(),
            network_interfaces: Vec::new(),
            mmds: None,
            balloon: None,
            entropy: Some(Entropy { rate_limiter: None }),
        },
        device,
    }
}

#[test]
fn foreign_files_are_told_from_damaged_ones() {
    assert!(matches!(State::decode(b""), Err(Error::Foreign)));
    assert!(matches!(State::decode(&[0; 4096]), Err(Error::Foreign)));
    let mut newer = state(vec![1]).encode().unwrap();
    newer[8] = 2;
    assert!(matches!(State::decode(&newer), Err(Error::Version(2))));
    let mut endless = state(vec![1]).encode().unwrap();
    endless[23] = 0xff;
    assert!(matches!(State::decode(&endless), Err(Error::Damaged)));
}

proptest! {
    #[test]
    fn what_is_written_is_read(device in prop::collection::vec(any::<u8>(), 0..500)) {
        let state = state(device);
        prop_assert_eq!(State::decode(&state.encode().unwrap()).unwrap(), state);
    }

    #[test]
    fn no_damage_goes_unnoticed(device in prop::collection::vec(any::<u8>(), 1..100), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut bytes = state(device).encode().unwrap();
        let cut = at.index(bytes.len());
        prop_assert!(State::decode(&bytes[..cut]).is_err());
        bytes[cut] ^= 1_u8 << bit;
        prop_assert!(State::decode(&bytes).is_err());
    }
}
