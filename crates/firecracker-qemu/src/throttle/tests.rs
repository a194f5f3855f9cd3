use super::*;
use crate::api::types::MacAddress;

fn bucket(size: u64, refill_time: u64) -> Option<TokenBucket> {
    Some(TokenBucket { size, one_time_burst: Some(1 << 40), refill_time })
}

fn interface(rx: Option<RateLimiter>, tx: Option<RateLimiter>) -> NetworkInterface {
    NetworkInterface {
        iface_id: "eth0".to_owned(),
        host_dev_name: "tap0".to_owned(),
        guest_mac: None::<MacAddress>,
        mtu: None,
        rx_rate_limiter: rx,
        tx_rate_limiter: tx,
    }
}

#[test]
fn a_bucket_is_a_rate_per_second() {
    let limiter = RateLimiter { bandwidth: bucket(1_000_000, 100), ops: bucket(10, 2000) };
    let arguments = drive("drive-0", Some(&limiter));
    assert_eq!((&arguments["bps"], &arguments["iops"]), (&json!(10_000_000), &json!(5)));
    assert_eq!(arguments.get("bps_max"), None, "QEMU takes no burst below the rate");
    assert_eq!(arguments["iops_max"], 10);
}

#[test]
fn a_bucket_with_a_zero_limits_nothing() {
    for (size, refill_time) in [(0, 100), (100, 0), (0, 0)] {
        let limiter = RateLimiter { bandwidth: bucket(size, refill_time), ops: None };
        assert_eq!(drive("drive-0", Some(&limiter)), drive("drive-0", None));
        assert_eq!(tap(&interface(Some(limiter), Some(limiter))), []);
    }
}

#[test]
fn the_slowest_rate_is_one_and_the_fastest_is_none() {
    let slow = RateLimiter { bandwidth: bucket(1, 1 << 40), ops: None };
    assert_eq!(drive("drive-0", Some(&slow))["bps"], 1);
    let fast = RateLimiter { bandwidth: bucket(u64::MAX, 1), ops: None };
    assert_eq!(drive("drive-0", Some(&fast))["bps"], QEMU_MAX);
    assert_eq!(tap(&interface(Some(fast), None)), []);
}

#[test]
fn a_tap_is_limited_each_way_by_bytes_and_packets() {
    let limiter = RateLimiter { bandwidth: bucket(1_000_000, 1000), ops: bucket(7, 1000) };
    let limits = tap(&interface(Some(limiter), Some(RateLimiter { bandwidth: bucket(10, 1000), ops: None })));
    assert_eq!(
        limits,
        [
            (Direction::Receive, Limit::Bytes { per_second: 1_000_000, burst: 1_000_000 }),
            (Direction::Receive, Limit::Packets { per_second: 7, burst: 7 }),
            (Direction::Transmit, Limit::Bytes { per_second: 10, burst: 128 << 10 }),
        ]
    );
}

#[test]
fn a_patch_replaces_the_buckets_it_names() {
    let old = RateLimiter { bandwidth: bucket(1, 1), ops: bucket(2, 2) };
    let new = patched(Some(old), RateLimiter { bandwidth: bucket(3, 3), ops: None });
    assert_eq!(new, RateLimiter { bandwidth: bucket(3, 3), ops: bucket(2, 2) });
}
