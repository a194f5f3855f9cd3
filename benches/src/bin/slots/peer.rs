//! The same network by commands.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::table::Took;

/// Makes and removes slot `number`.
pub fn round(number: u32) -> Result<Took> {
    let [high, low] = (number as u16).to_be_bytes();
    let host_ip = format!("10.11.{high}.{low}");
    let pair = |number: u16| {
        let [high, low] = number.to_be_bytes();
        format!("10.12.{high}.{low}")
    };
    let (near, far) = (pair(2 * number as u16), pair(2 * number as u16 + 1));
    let (netns, veth) = (format!("peer-ns-{number}"), format!("peer-veth{number}"));
    let ours = std::process::id();
    let make = [
        format!("ip netns add {netns}"),
        format!("ip -n {netns} link add eth0 type veth peer name {veth}"),
        format!("ip -n {netns} addr add {far}/31 dev eth0"),
        format!("ip -n {netns} link set eth0 up"),
        format!("ip -n {netns} link set {veth} netns {ours}"),
        format!("ip -n {netns} tuntap add tap0 mode tap"),
        format!("ip -n {netns} link set tap0 txqueuelen 5000"),
        format!("ip -n {netns} addr add 169.254.0.22/30 dev tap0"),
        format!("ip -n {netns} link set tap0 up"),
        format!("ip -n {netns} link set lo up"),
        format!("ip -n {netns} route add default via {near}"),
        format!("ip netns exec {netns} sysctl -qw net.ipv4.ip_forward=1"),
        format!("ip netns exec {netns} iptables -t nat -A POSTROUTING -o eth0 -s 169.254.0.21 -j SNAT --to {far}"),
        format!("ip netns exec {netns} iptables -t nat -A PREROUTING -i eth0 -d {host_ip} -j DNAT --to 169.254.0.21"),
        format!("ip addr add {near}/31 dev {veth}"),
        format!("ip link set {veth} up"),
        format!("ip route add {host_ip}/32 via {far} dev {veth}"),
        format!("iptables -A FORWARD -i {veth} -o up0 -j ACCEPT"),
        format!("iptables -A FORWARD -i up0 -o {veth} -j ACCEPT"),
        format!("iptables -t nat -A POSTROUTING -s {far}/32 -o up0 -j MASQUERADE"),
    ];
    let remove = [
        format!("iptables -t nat -D POSTROUTING -s {far}/32 -o up0 -j MASQUERADE"),
        format!("iptables -D FORWARD -i up0 -o {veth} -j ACCEPT"),
        format!("iptables -D FORWARD -i {veth} -o up0 -j ACCEPT"),
        format!("ip link del {veth}"),
        format!("ip netns del {netns}"),
    ];
    let begun = Instant::now();
    make.iter().try_for_each(|line| run(line))?;
    let made = begun.elapsed();
    let begun = Instant::now();
    remove.iter().try_for_each(|line| run(line))?;
    Ok(Took { made, removed: begun.elapsed() })
}

fn run(line: &str) -> Result<()> {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap_or_default()).args(words).status()?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

/// Runs lines of shell.
pub fn sh(lines: &str) -> Result<()> {
    let status = Command::new("sh").args(["-ec", lines]).status()?;
    ensure!(status.success(), "{lines}: {status}");
    Ok(())
}
