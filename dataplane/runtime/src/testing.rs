//! What tests of several modules need: a namespace of their own, and waiting for an event.

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;
use crate::tun::request;

/// A namespace with a loopback interface of this MTU that is up, unless that is not permitted here.
pub(crate) fn loopback(mtu: i32) -> Option<Netns> {
    let netns = Netns::anonymous().inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let configure = || {
        let control = UdpSocket::bind("0.0.0.0:0").unwrap();
        let (mut up, mut size) = (request("lo").unwrap(), request("lo").unwrap());
        up.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        size.ifr_ifru.ifru_mtu = mtu;
        for (number, request) in [(libc::SIOCSIFMTU, &size), (libc::SIOCSIFFLAGS, &up)] {
            // SAFETY: both read one ifreq from a live value.
            let result = unsafe { libc::ioctl(control.as_raw_fd(), number as _, &raw const *request) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
    };
    netns.run(configure).unwrap();
    Some(netns)
}

/// Waits until there is something to read.
pub(crate) fn wait(fd: impl AsFd) {
    assert!(poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000u16)).unwrap() > 0, "nothing within 5 s");
}
