//! The lab itself, without any gateway: what the other programs rely on must hold of the kernel alone.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use podgate::lab::program::route::{Hop, path_mtu, traceroute};
use podgate::lab::program::{PORT, bulk, client, ping, raw};
use podgate::lab::{Lab, OUTSIDE};
use podgate::netlink::Family;
use podgate_runtime::ethtool::{self, Switch};
use podgate_testbed::{Bed, Outcome, run};

const PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    run(|tests| {
        tests.add("nodes and the outside exchange TCP, UDP and ICMP over the underlay", exchange);
        tests.add("a server waits for a client that pauses", pause);
        tests.add("a datagram with a false source arrives where nothing checks it", false_source);
        tests.add("offloads of the underlay can be switched", offloads);
        tests.add("a route's path MTU is reported to a sender that forbids fragments", path_mtu_is_reported);
        tests.add("a neighbour flood can be sent", flood);
        tests.add("a ticking connection counts its answers", ticker);
    })
}

fn machines(bed: &Bed, name: &str) -> Result<Lab, Box<dyn std::error::Error>> {
    let lab = Lab::builder(bed.sandbox(), "/nonexistent".as_ref()).named(name).machines()?;
    lab.outside().serve()?;
    for node in lab.nodes() {
        node.machine().serve()?;
    }
    Ok(lab)
}

fn exchange(bed: &Bed) -> Outcome {
    let lab = machines(bed, "exchange")?;
    let (from, to) = (lab.node(1).machine(), lab.node(2).machine());
    for family in Family::BOTH {
        let address = to.addresses().server(family);
        for answer in [
            from.run(|| client::tcp(address, 300_000, PATIENCE))??,
            from.run(|| client::udp(address, 1000, 1, PATIENCE))??,
            from.run(|| client::udp(address, 9000, 1, PATIENCE))??,
        ] {
            assert_eq!((answer.server.as_str(), answer.seen.ip()), ("node-2", from.address(family)));
        }
        let reply = from.run(|| ping::ping(address.ip(), 9000, PATIENCE))??;
        podgate::lab::wait_until(
            PATIENCE,
            || "the note of a ping".into(),
            || Ok((to.serve()?.pinged_by(reply.mark) != Some(from.address(family))).then(|| "not yet".into())),
        )?;
        let hops = from.run(|| traceroute(address, 3, PATIENCE))??;
        assert_eq!(hops, [Hop::Destination]);
        let transfer = from.run(|| bulk::send(address, 8 << 20, PATIENCE))??;
        assert_eq!(transfer.answer.server, "node-2");
        let nobody = SocketAddr::new(address.ip(), PORT + 1);
        assert!(from.run(|| client::tcp(nobody, 1, PATIENCE))?.is_err(), "nobody listens there");
    }
    Ok(())
}

/// As a stream does that waits for a retransmission, which takes 200 ms at least.
fn pause(bed: &Bed) -> Outcome {
    let lab = machines(bed, "pause")?;
    let to = lab.node(1).machine().addresses().server(Family::V4);
    lab.outside().run(|| -> std::io::Result<()> {
        let mut stream = TcpStream::connect(to)?;
        stream.write_all(b"Ebefore and ")?;
        // Nothing comes before the end, however long that takes.
        stream.set_read_timeout(Some(Duration::from_millis(600)))?;
        let early = stream.read(&mut [0; 100]);
        assert!(early.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{early:?}");
        stream.write_all(b"after")?;
        stream.shutdown(Shutdown::Write)?;
        let mut reply = String::new();
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_to_string(&mut reply)?;
        assert!(reply.ends_with("\nbefore and after"), "{reply}");
        Ok(())
    })??;
    Ok(())
}

fn false_source(bed: &Bed) -> Outcome {
    let lab = machines(bed, "false-source")?;
    for (family, source) in [(Family::V4, "192.0.2.77"), (Family::V6, "2001:db8::77")] {
        let to = lab.node(1).machine().addresses().server(family);
        lab.outside().run(|| raw::spoof_udp(source.parse().unwrap(), to, source))??;
        podgate::lab::wait_until(
            PATIENCE,
            || "the false datagram".into(),
            || Ok((!lab.spoofs_delivered()?.iter().any(|spoof| spoof.contains(source))).then(|| "not yet".into())),
        )?;
    }
    Ok(())
}

fn offloads(bed: &Bed) -> Outcome {
    let lab = machines(bed, "offloads")?;
    let node = lab.node(1);
    let active = |name: &str| -> Result<bool, Box<dyn std::error::Error>> {
        let features = node.machine().run(|| ethtool::features("eth0"))??;
        Ok(features.iter().find(|feature| feature.name == name).ok_or("no such offload")?.active)
    };
    assert!(active("tx-udp-segmentation")?);
    lab.set_offloads(node, &[("tx-udp-segmentation", Switch::Off), ("rx-gro", Switch::Off)])?;
    assert!(!active("tx-udp-segmentation")?);
    lab.set_offloads(node, &[("tx-udp-segmentation", Switch::On)])?;
    assert!(active("tx-udp-segmentation")?);
    Ok(())
}

fn path_mtu_is_reported(bed: &Bed) -> Outcome {
    use podgate::netlink::{RouteSpec, TABLE_MAIN};
    let lab = machines(bed, "mtu")?;
    let (from, via, to) = (lab.node(1).machine(), lab.outside(), lab.node(2).machine());
    // A router between the two whose way on is narrower.
    via.set_sysctl("net/ipv4/ip_forward", "1")?;
    let destination = format!("{}/32", to.addresses().v4).parse()?;
    from.netlink()?.add_route(&RouteSpec::unicast(TABLE_MAIN, destination, "eth0").via(via.addresses().v4.into()))?;
    via.netlink()?.add_route(&RouteSpec::unicast(TABLE_MAIN, destination, "eth0").mtu(1300))?;
    let hops = from.run(|| traceroute(to.addresses().server(Family::V4), 3, PATIENCE))??;
    assert_eq!(hops, [Hop::Router(via.addresses().v4.into()), Hop::Destination]);
    let found = from.run(|| path_mtu(to.addresses().server(Family::V4), 1400, PATIENCE))??;
    assert_eq!((found.reported.first(), found.delivered), (Some(&(1300, Some(via.addresses().v4.into()))), true));
    Ok(())
}

fn flood(bed: &Bed) -> Outcome {
    let lab = machines(bed, "flood")?;
    let gateway = lab.node(1).machine().addresses();
    lab.outside().run(|| raw::neighbour_flood("eth0", gateway.v4, gateway.v6, 100))??;
    Ok(())
}

fn ticker(bed: &Bed) -> Outcome {
    let lab = machines(bed, "ticker")?;
    let to = lab.node(1).machine().addresses().server(Family::V6);
    let ticker = lab.with_machine(OUTSIDE, |machine| bulk::Ticker::start(machine.netns(), to, Duration::from_millis(1), PATIENCE))??;
    podgate::lab::wait_until(PATIENCE, || "ten ticks".into(), || Ok((ticker.answered() < 10).then(|| "fewer".into())))?;
    let report = ticker.finish();
    assert!(report.broken.is_none(), "{report:?}");
    Ok(())
}
