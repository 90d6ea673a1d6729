//! The other node, and the way to it.

use nix::sys::signal::Signal;
use podgate::netlink::{LinkSettings, Netlink};

use crate::{Fault, Try, Undo, Ward};

/// Changes node-2's port of the underlay.
fn port<'a>(ward: &'a Ward<'a>, now: &LinkSettings, later: LinkSettings) -> Try<Undo<'a>> {
    let underlay = Netlink::open(ward.lab.underlay().netns())?;
    underlay.set_link("node-2", now)?;
    Ok(Box::new(move || Ok(underlay.set_link("node-2", &later)?)))
}

/// A narrow path that the kernel knows of, to both of the other node's addresses.
fn narrow<'a>(ward: &'a Ward<'a>) -> Try<Undo<'a>> {
    ward.shell("ip route add 192.0.2.2/32 dev eth0 mtu 1400 && ip -6 route add 2001:db8::2/128 dev eth0 mtu 1400")?;
    Ok(Box::new(|| {
        ward.shell("ip route del 192.0.2.2/32 dev eth0 && ip -6 route del 2001:db8::2/128 dev eth0")?;
        // A path that was found narrow is remembered for ten minutes.
        ward.lab.restart(ward.node, Signal::SIGTERM)?;
        Ok(())
    }))
}

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "a peer without a gateway",
        make: |ward| {
            let other = ward.lab.node(2);
            other.end(Signal::SIGTERM)?;
            Ok(Box::new(|| {
                other.launch(&ward.settings)?;
                Ok(other.wait_ready()?)
            }))
        },
        check: "peers",
        status: "failure",
        words: &["node-2 does not answer through the overlay", "answers a ping", "UDP port 4790"],
    },
    Fault {
        name: "a peer that is cut off",
        make: |ward| port(ward, &LinkSettings::new().down(), LinkSettings::new().up()),
        check: "peers",
        status: "failure",
        words: &["node-2 answers neither", "the underlay leads to it"],
    },
    Fault {
        name: "a path that swallows large packets",
        make: |ward| port(ward, &LinkSettings::new().mtu(1300), LinkSettings::new().mtu(1500)),
        check: "path-mtu",
        status: "failure",
        words: &["node-2 answers small packets", "large ones are lost", "MTU"],
    },
    Fault {
        name: "a narrow path",
        make: narrow,
        check: "path-mtu",
        status: "warning",
        words: &["the path to node-2 carries packets of 13", "pods send up to 14"],
    },
];
