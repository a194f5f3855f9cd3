//! The capsule's one network: the same addresses in every capsule, normally configured by the kernel's `ip=` already.

use crate::sys::net::Interfaces;
use std::io;
use std::net::Ipv4Addr;

const LOOPBACK: &str = "lo";
const INTERFACE: &str = "eth0";
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);

/// Brings up `lo`, and completes `eth0` where the kernel has not. A machine without `eth0` has no network, by intent.
pub fn configure() -> io::Result<()> {
    let interfaces = Interfaces::open()?;
    interfaces.bring_up(LOOPBACK)?;
    let up = match interfaces.is_up(INTERFACE) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        other => other?,
    };
    let addressed = interfaces.address(INTERFACE)? == Some(ADDRESS) && interfaces.netmask(INTERFACE)? == Some(NETMASK);
    if !up || !addressed {
        interfaces.set_address(INTERFACE, ADDRESS, NETMASK)?;
    }
    if !has_default_route(&std::fs::read_to_string("/proc/net/route")?) {
        interfaces.set_default_route(GATEWAY)?;
    }
    Ok(())
}

/// `/proc/net/route`: interface, destination, gateway, ... in hexadecimal; the default route's destination is zero.
fn has_default_route(routes: &str) -> bool {
    routes.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace();
        fields.next() == Some(INTERFACE) && fields.next() == Some("00000000")
    })
}

#[cfg(test)]
mod tests {
    use super::has_default_route;

    #[test]
    fn finds_the_default_route() {
        let header = "Iface\tDestination\tGateway \tFlags\n";
        assert!(has_default_route(&format!("{header}eth0\t00000000\t1600FEA9\t0003\n")));
        assert!(!has_default_route(&format!("{header}eth0\t1400FEA9\t00000000\t0001\n")));
        assert!(!has_default_route(&format!("{header}eth1\t00000000\t1600FEA9\t0003\n")));
        assert!(!has_default_route(header));
    }
}
