//! The few interface requests that init needs: the classic IPv4 ioctls, which are one call each.

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io;
use std::net::Ipv4Addr;

/// A socket to ask through.
pub struct Interfaces(OwnedFd);

impl Interfaces {
    pub fn open() -> io::Result<Interfaces> {
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Interfaces(socket))
    }

    /// Whether an interface of that name exists, and whether it is up.
    pub fn is_up(&self, name: &str) -> io::Result<bool> {
        let mut request = request(name);
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the call above wrote the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        Ok(i32::from(flags) & libc::IFF_UP != 0)
    }

    /// Brings an interface up.
    pub fn bring_up(&self, name: &str) -> io::Result<()> {
        let mut request = request(name);
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the call above wrote the flags, and i16 has no invalid values.
        unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16 };
        self.ask(libc::SIOCSIFFLAGS, &mut request)
    }

    /// The interface's address, `None` if it has none.
    pub fn address(&self, name: &str) -> io::Result<Option<Ipv4Addr>> {
        self.get(libc::SIOCGIFADDR, name)
    }

    /// The interface's netmask, `None` if it has no address.
    pub fn netmask(&self, name: &str) -> io::Result<Option<Ipv4Addr>> {
        self.get(libc::SIOCGIFNETMASK, name)
    }

    /// Gives the interface an address and brings it up.
    pub fn set_address(&self, name: &str, address: Ipv4Addr, netmask: Ipv4Addr) -> io::Result<()> {
        for (what, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, netmask)] {
            let mut request = request(name);
            request.ifr_ifru.ifru_addr = socket_address(value);
            self.ask(what, &mut request)?;
        }
        self.bring_up(name)
    }

    /// Adds the default route.
    pub fn set_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: a struct of integers, pointers and byte arrays, for which zero is valid.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: the request reads a live `rtentry` whose device pointer is null.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
    }

    fn get(&self, what: libc::Ioctl, name: &str) -> io::Result<Option<Ipv4Addr>> {
        let mut request = request(name);
        match self.ask(what, &mut request) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => return Ok(None),
            Err(error) => return Err(error),
        }
        // SAFETY: the call above wrote an address, and any bytes are a valid one.
        let data = unsafe { request.ifr_ifru.ifru_addr.sa_data };
        let [_, _, a, b, c, d, ..] = data.map(i8::cast_unsigned);
        Ok(Some(Ipv4Addr::new(a, b, c, d)))
    }

    fn ask(&self, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every request used here reads and writes one `ifreq`, which is live.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what, std::ptr::from_mut(request)) })
    }
}

/// Lets a socket accept connections for ports that are not its own, as a packet rule hands them to it.
pub fn set_transparent(socket: impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option reads one integer from the address given, which is a live one.
    check(unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_IP,
            libc::IP_TRANSPARENT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    })
}

/// Moves this thread into a network of its own, for a test.
#[cfg(test)]
pub fn enter_new_network() {
    // SAFETY: descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about an interface; a name that does not fit is cut, and then names none.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: a struct of integers, a pointer and byte arrays, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// `sockaddr_in` in the clothes of `sockaddr`: port, then address, both in network order.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0i8; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}
