use super::*;
use crate::api::types::{Balloon, Entropy, NetworkInterface};

const FDS: Inherited = Inherited { memory: 10, monitor: 11, handshake: Some(12) };

fn drive(id: &str, root: bool) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        is_root_device: root,
        partuuid: None,
        cache_type: CacheType::Unsafe,
        is_read_only: false,
        path_on_host: Some(format!("/disks/{id}, with=commas").into()),
        rate_limiter: None,
        io_engine: IoEngine::Sync,
        socket: None,
    }
}

fn config() -> VmConfig {
    VmConfig {
        drives: vec![drive("root", true), drive("data", false)],
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".to_owned(),
            host_dev_name: "tap0".to_owned(),
            guest_mac: Some("02:FC:00:00:00:05".to_owned().try_into().unwrap()),
            mtu: Some(1400),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }],
        balloon: Some(Balloon {
            amount_mib: 1,
            deflate_on_oom: true,
            stats_polling_interval_s: 0,
            free_page_hinting: false,
            free_page_reporting: false,
        }),
        entropy: Some(Entropy { rate_limiter: None }),
        ..VmConfig::default()
    }
}

fn source(boot_args: Option<&str>) -> BootSource {
    BootSource { kernel_image_path: "/k".into(), initrd_path: None, boot_args: boot_args.map(str::to_owned) }
}

fn values<'a>(argv: &'a [String], flag: &str) -> Vec<&'a str> {
    argv.windows(2).filter(|pair| pair[0] == flag).map(|pair| pair[1].as_str()).collect()
}

#[test]
fn devices_come_in_firecrackers_order() {
    let argv = arguments(&config(), Origin::Snapshot, FDS, None);
    let devices: Vec<Value> =
        values(&argv, "-device").into_iter().map(|device| serde_json::from_str(device).unwrap()).collect();
    let order: Vec<_> = devices.iter().map(|device| (&device["driver"], &device["bus"])).collect();
    let bus = |slot| json!(format!("virtio-mmio-bus.{slot}"));
    assert_eq!(
        order,
        [
            (&json!("i8042"), &Value::Null),
            (&json!("virtio-balloon-device"), &bus(0)),
            (&json!("virtio-blk-device"), &bus(1)),
            (&json!("virtio-blk-device"), &bus(2)),
            (&json!("virtio-net-device"), &bus(3)),
            (&json!("virtio-rng-device"), &bus(4)),
        ]
    );
}

#[test]
fn a_path_is_never_an_option() {
    let argv = arguments(&config(), Origin::Snapshot, FDS, None);
    let node: Value = serde_json::from_str(values(&argv, "-blockdev")[0]).unwrap();
    assert_eq!(node["file"]["filename"], "/disks/root, with=commas");
    let userfault = Userfault { missing: true, track: false };
    let argv = arguments(&config(), Origin::Snapshot, FDS, Some((Path::new("/a,b/p.so"), userfault)));
    let expected = "file=/a,,b/p.so,fd=12,memory=firecracker-qemu-memory,missing=on,track=off";
    assert_eq!(values(&argv, "-plugin"), [expected]);
}

#[test]
fn the_command_line_is_the_clients_with_ours_after() {
    let line = |boot_args, config: &VmConfig| kernel_command_line(config, &source(boot_args), 2_600_000, 1);
    assert_eq!(
        line(Some("quiet"), &config()),
        "quiet root=/dev/vda rw tsc_early_khz=2600000 tsc=reliable virtio_mmio.device=512@0xfeb00000:5"
    );
    assert!(line(None, &VmConfig::default()).starts_with("reboot=k panic=1 nomodule"));
    assert!(!line(None, &VmConfig::default()).contains("root="));

    let mut with_uuid = config();
    with_uuid.drives[0].partuuid = Some("0eaa91a0-01".to_owned());
    with_uuid.drives[0].is_read_only = true;
    assert!(line(Some("quiet"), &with_uuid).starts_with("quiet root=PARTUUID=0eaa91a0-01 ro "));

    let with_init = line(Some("quiet -- one two"), &config());
    assert!(with_init.ends_with(":5 -- one two") && with_init.starts_with("quiet root="), "{with_init}");
}

#[test]
fn a_snapshot_needs_no_kernel() {
    let boot = arguments(&config(), Origin::Boot { source: &source(None), tsc_khz: 1 }, FDS, None);
    assert_eq!(values(&boot, "-kernel"), ["/k"]);
    assert!(values(&boot, "-incoming").is_empty());
    let restore = arguments(&config(), Origin::Snapshot, FDS, None);
    assert!(values(&restore, "-kernel").is_empty() && values(&restore, "-append").is_empty());
    assert_eq!(values(&restore, "-incoming"), ["defer"]);
}

#[test]
fn threads_are_siblings_only_with_smt() {
    let mut config = config();
    config.machine.vcpu_count = 4;
    let smp = |config: &VmConfig| values(&arguments(config, Origin::Snapshot, FDS, None), "-smp")[0].to_owned();
    assert_eq!(smp(&config), "cpus=4,sockets=1,cores=4,threads=1");
    config.machine.smt = true;
    assert_eq!(smp(&config), "cpus=4,sockets=1,cores=2,threads=2");
}
