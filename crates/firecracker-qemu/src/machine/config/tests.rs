use std::path::Path;

use super::*;

fn drive(id: &str, root: bool, path: &Path) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        is_root_device: root,
        partuuid: None,
        cache_type: CacheType::Unsafe,
        is_read_only: true,
        path_on_host: Some(path.to_owned()),
        rate_limiter: None,
        io_engine: IoEngine::Sync,
        socket: None,
    }
}

fn interface(id: &str, tap: &str, mac: Option<&str>) -> NetworkInterface {
    NetworkInterface {
        iface_id: id.to_owned(),
        host_dev_name: tap.to_owned(),
        guest_mac: mac.map(|mac| mac.to_owned().try_into().unwrap()),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    }
}

#[test]
fn the_root_drive_comes_first_and_there_is_one() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut config = VmConfig::default();
    config.set_drive(drive("a", false, file.path())).unwrap();
    config.set_drive(drive("b", false, file.path())).unwrap();
    config.set_drive(drive("root", true, file.path())).unwrap();
    let ids = |config: &VmConfig| config.drives.iter().map(|drive| drive.drive_id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&config), ["root", "a", "b"]);
    assert!(matches!(config.set_drive(drive("other", true, file.path())), Err(Error::SecondRoot)));
    config.set_drive(drive("root", true, file.path())).unwrap();
    assert_eq!(ids(&config), ["root", "a", "b"], "a drive of the same id is replaced");
    let missing = drive("c", false, Path::new("/no/such/file"));
    assert!(matches!(config.set_drive(missing), Err(Error::File { .. })));
}

#[test]
fn there_is_room_for_eight_devices() {
    let mut config = VmConfig::default();
    for index in 0..7 {
        config.set_network_interface(interface(&format!("e{index}"), &format!("t{index}"), None)).unwrap();
    }
    config.set_entropy(Entropy { rate_limiter: None }).unwrap();
    config.set_entropy(Entropy { rate_limiter: None }).unwrap();
    assert!(matches!(config.set_network_interface(interface("e8", "t8", None)), Err(Error::TooManyDevices)));
    config.set_network_interface(interface("e0", "t9", None)).unwrap();
}

#[test]
fn interfaces_share_nothing() {
    let mut config = VmConfig::default();
    let mac = Some("02:fc:00:00:00:05");
    config.set_network_interface(interface("e0", "t0", mac)).unwrap();
    assert!(matches!(config.set_network_interface(interface("e1", "t0", None)), Err(Error::TapInUse(_))));
    assert!(matches!(config.set_network_interface(interface("e1", "t1", mac)), Err(Error::MacInUse(_))));
    for bad in ["", "..", "a/b", "a b", "sixteen-letters-x"] {
        assert!(matches!(config.set_network_interface(interface("e1", bad, None)), Err(Error::TapName(_))), "{bad:?}");
    }
}

#[test]
fn the_balloon_fits_in_the_memory_in_either_order() {
    let balloon = |amount_mib| Balloon {
        amount_mib,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_hinting: false,
        free_page_reporting: false,
    };
    let mut config = VmConfig::default();
    assert!(matches!(config.set_balloon(balloon(129)), Err(Error::BalloonTooLarge)));
    config.set_balloon(balloon(128)).unwrap();
    let smaller = MachineConfig { mem_size_mib: 127, ..MachineConfig::default() };
    assert!(matches!(config.set_machine(smaller), Err(Error::BalloonTooLarge)));
}

#[test]
fn what_the_machine_cannot_be_is_refused() {
    let mut config = VmConfig::default();
    let machine = MachineConfig::default;
    for (bad, vcpus) in [
        (MachineConfig { vcpu_count: 0, ..machine() }, true),
        (MachineConfig { vcpu_count: 3, smt: true, ..machine() }, true),
        (MachineConfig { huge_pages: HugePages::Hugetlbfs2M, ..machine() }, false),
        (MachineConfig { cpu_template: Some(CpuTemplate::T2), ..machine() }, false),
        (MachineConfig { mem_size_mib: u64::MAX, ..machine() }, false),
    ] {
        let error = config.set_machine(bad).unwrap_err();
        assert_eq!(matches!(error, Error::Vcpus), vcpus, "{error}");
    }
    assert_eq!(config, VmConfig::default());
}
