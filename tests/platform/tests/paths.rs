//! Every path × TCP, UDP, ICMP × IPv4, IPv6, in one packet and in fragments, with data compared byte for byte and the client's address
//! as the backend sees it; then what the network says of itself: gateways, traceroute, path MTU.
//!
//! `PODGATE_WORKERS=N` runs it with that many workers, `PODGATE_ATTACH=tun` with pods in that mode.

use std::process::ExitCode;

use podgate::lab::matrix::Probe;
use podgate::lab::{Lab, OUTSIDE};
use podgate::netlink::Family;
use podgate_testbed::{Bed, Outcome, all_hold, run};

fn main() -> ExitCode {
    run(|tests| {
        tests.add("TCP goes every path unharmed, and the backend sees the right client", |bed| probe(bed, Probe::Tcp));
        tests.add("UDP goes every path unharmed, and the backend sees the right client", |bed| probe(bed, Probe::Udp));
        tests.add("UDP of 9,000 bytes goes every path in fragments", |bed| probe(bed, Probe::UdpFragments));
        tests.add("echo requests go every path, and whoever is dialled answers", |bed| probe(bed, Probe::Icmp));
        tests.add("echo requests of 9,000 bytes go every path in fragments", |bed| probe(bed, Probe::IcmpFragments));
        tests.add("gateways answer ping", |bed| all_hold(&bed.lab()?.check_gateways()?));
        tests.add("traceroute sees every hop, in the terms of the address dialled", |bed| {
            let lab = bed.lab()?;
            all_hold(&lab.check_traceroutes(&lab.paths()?)?)
        });
        tests.add("a sender learns the path MTU through the overlay", |bed| all_hold(&bed.lab()?.check_path_mtu()?));
        tests.add("connections to a service spread over all its backends", spread);
        tests.add("somebody outside reaches a pod by its address, and is seen as himself", outside_to_pod);
        tests.add("nothing answers at a port that the service does not have", closed_port);
    })
}

fn probe(bed: &Bed, probe: Probe) -> Outcome {
    let lab = bed.lab()?;
    all_hold(&lab.check_paths(&lab.paths()?, &[probe], &|_, _| {})?)
}

fn spread(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let mut checks = Vec::new();
    for client in ["a1", "b2", "node-1", OUTSIDE] {
        checks.push(Lab::check_spread(&lab.spread(client, 100)?));
    }
    all_hold(&checks)
}

fn outside_to_pod(bed: &Bed) -> Outcome {
    use podgate::lab::program::client;
    use podgate::netlink::{RouteSpec, TABLE_MAIN};
    let lab = bed.lab()?;
    let (outside, pod) = (lab.outside(), lab.pod("a1")?);
    for (family, prefix) in [(Family::V4, "10.244.1.0/24"), (Family::V6, "fd00:77:1::/64")] {
        let route = RouteSpec::unicast(TABLE_MAIN, prefix.parse()?, "eth0").via(lab.node(1).machine().address(family));
        outside.netlink()?.replace_route(&route)?;
        let to = pod.machine().addresses().server(family);
        let patience = std::time::Duration::from_secs(2);
        let answers = [outside.run(|| client::tcp(to, 300_000, patience))?, outside.run(|| client::udp(to, 9000, 2, patience))?];
        outside.netlink()?.delete_route(&route)?;
        for answer in answers {
            assert_eq!(answer?.seen.ip(), outside.address(family));
        }
    }
    Ok(())
}

/// An undefined port of a VIP is refused at once, not left to a timeout.
fn closed_port(bed: &Bed) -> Outcome {
    use podgate::lab::program::{ExchangeError, client};
    let lab = bed.lab()?;
    let pod = lab.pod("b1")?;
    for family in Family::BOTH {
        let to = std::net::SocketAddr::new(lab.service("web")?.vips.of(family), 81);
        let patience = std::time::Duration::from_secs(2);
        match pod.machine().run(|| client::tcp(to, 1, patience))? {
            Err(ExchangeError::Refused { source, .. }) => assert_eq!(source.kind(), std::io::ErrorKind::ConnectionRefused, "{family}"),
            other => return Err(format!("{family}: TCP to a port that the service does not have: {other:?}").into()),
        }
        match pod.machine().run(|| client::udp(to, 1, 1, patience))? {
            Err(ExchangeError::NoAnswer { source, .. }) => assert_eq!(source.kind(), std::io::ErrorKind::ConnectionRefused, "{family}"),
            other => return Err(format!("{family}: UDP to a port that the service does not have: {other:?}").into()),
        }
    }
    Ok(())
}
