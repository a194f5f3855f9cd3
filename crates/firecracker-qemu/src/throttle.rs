//! Firecracker's token buckets in the terms of what enforces them here: QEMU for drives, nftables for taps.
//!
//! A bucket is a mean rate, `size` per `refill_time`, and a burst, `size`. `one_time_burst` has no counterpart and is
//! not granted: a limiter is never looser for it.

use serde_json::{Value, json};

use crate::api::types::{NetworkInterface, RateLimiter, TokenBucket};
use crate::netlink::{Direction, Limit};

/// The largest rate QEMU takes.
const QEMU_MAX: u64 = 1_000_000_000_000_000;

/// Above this nftables' arithmetic overflows; no tap carries it.
const NFT_MAX: u64 = 8_000_000_000;

/// A guest sends segments of up to 64 KiB as one packet, which a smaller burst would never let through.
const MIN_BURST: u64 = 128 << 10;

/// The arguments of `block_set_io_throttle` for a drive.
pub fn drive(device: &str, limiter: Option<&RateLimiter>) -> Value {
    let mut arguments = json!({ "id": device });
    let limiter = limiter.copied().unwrap_or_default();
    for (name, bucket) in [("bps", limiter.bandwidth), ("iops", limiter.ops)] {
        let rate = bucket.and_then(per_second).map_or(0, |rate| rate.min(QEMU_MAX));
        arguments[name] = json!(rate);
        arguments[format!("{name}_rd")] = json!(0);
        arguments[format!("{name}_wr")] = json!(0);
        // QEMU allows a tenth of a second's worth at once by itself, and no burst below the rate.
        if let Some(bucket) = bucket.filter(|bucket| rate > 0 && bucket.size > rate) {
            arguments[format!("{name}_max")] = json!(bucket.size.min(QEMU_MAX));
        }
    }
    arguments
}

/// The limits on a tap.
pub fn tap(interface: &NetworkInterface) -> Vec<(Direction, Limit)> {
    let directions =
        [(Direction::Receive, interface.rx_rate_limiter), (Direction::Transmit, interface.tx_rate_limiter)];
    let mut limits = Vec::new();
    for (direction, limiter) in directions {
        let limiter = limiter.unwrap_or_default();
        if let Some((per_second, size)) = limiter.bandwidth.and_then(limit) {
            let burst = u32::try_from(size.max(MIN_BURST)).unwrap_or(u32::MAX);
            limits.push((direction, Limit::Bytes { per_second, burst }));
        }
        if let Some((per_second, size)) = limiter.ops.and_then(limit) {
            let burst = u32::try_from(size).unwrap_or(u32::MAX);
            limits.push((direction, Limit::Packets { per_second, burst }));
        }
    }
    limits
}

/// The limiter after a PATCH: each bucket that is given replaces the old one.
pub fn patched(old: Option<RateLimiter>, patch: RateLimiter) -> RateLimiter {
    let old = old.unwrap_or_default();
    RateLimiter { bandwidth: patch.bandwidth.or(old.bandwidth), ops: patch.ops.or(old.ops) }
}

fn limit(bucket: TokenBucket) -> Option<(u64, u64)> {
    per_second(bucket).filter(|rate| *rate <= NFT_MAX).map(|rate| (rate, bucket.size))
}

/// Tokens per second, at least one; a bucket with a zero in it limits nothing.
fn per_second(bucket: TokenBucket) -> Option<u64> {
    let millis = Some(bucket.refill_time).filter(|millis| *millis > 0)?;
    let size = Some(bucket.size).filter(|size| *size > 0)?;
    Some(u64::try_from(u128::from(size) * 1000 / u128::from(millis)).unwrap_or(u64::MAX).max(1))
}

#[cfg(test)]
mod tests;
