//! Direct return: the pod of another node sees a node port's client as it is and answers it past the node that was dialled.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::Signal;
use podgate::lab::manifest::{EndpointSpec, ServiceSpec, TrafficPolicy};
use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::{client, raw, server};
use podgate::lab::{Dual, Lab, NodeSettings, wait_until};
use podgate::netlink::Family;
use podgate_testbed::{Bed, Outcome, run};

const PATIENCE: Duration = Duration::from_secs(10);
const NODE_PORT: u16 = 30050;

fn main() -> ExitCode {
    run(|tests| {
        tests.configure(NodeSettings { extra: "overlay: {directReturnVni: 2}\n".into(), ..NodeSettings::default() });
        tests.add("a pod of another node sees the client as it is, over TCP, over UDP and in fragments", seen_as_it_is);
        tests.add("the answers pass the node that was dialled by", past_the_node);
        tests.add("pods and nodes that dial a node port are served as ever", inside);
        tests.add("connections outlive both gateways", restarts);
        tests.add("what a peer hands on is refused by name unless it is a client's to a service", refused);
    })
}

/// The lab with one more service: its only endpoint is a pod of node-2.
fn lab(bed: &Bed) -> Result<&Lab, Box<dyn std::error::Error>> {
    let lab = bed.lab()?;
    if lab.service("far").is_err() {
        let pod = lab.pod("a2")?;
        let endpoints = vec![EndpointSpec { addresses: pod.machine().addresses(), node: lab.nodes()[pod.node()].name().to_owned() }];
        let vips = Dual { v4: "10.96.0.50".parse()?, v6: "fd00:96::50".parse()? };
        let far = ServiceSpec { name: "far".into(), vips, node_port: NODE_PORT, policy: TrafficPolicy::Cluster, endpoints };
        lab.set_services(lab.services().into_iter().chain([far]).collect())?;
    }
    Ok(lab)
}

/// What is dialled: the node port at node-1.
fn dialled(lab: &Lab, family: Family) -> SocketAddr {
    SocketAddr::new(lab.node(1).machine().address(family), NODE_PORT)
}

fn seen_as_it_is(bed: &Bed) -> Outcome {
    let lab = lab(bed)?;
    let outside = lab.outside();
    for family in Family::BOTH {
        let to = dialled(lab, family);
        for (what, answer) in [
            ("TCP", outside.run(|| client::tcp(to, 3_000_000, PATIENCE))??),
            ("UDP", outside.run(|| client::udp(to, 500, 3, PATIENCE))??),
            ("UDP in fragments", outside.run(|| client::udp(to, 9000, 3, PATIENCE))??),
        ] {
            assert_eq!((answer.server.as_str(), answer.seen.ip()), ("a2", outside.address(family)), "{what} over {family}");
        }
    }
    Ok(())
}

fn past_the_node(bed: &Bed) -> Outcome {
    let lab = lab(bed)?;
    let (front, back, outside) = (lab.node(1), lab.node(2), lab.outside());
    let to = dialled(lab, Family::V4);
    let received = || -> Result<u64, Box<dyn std::error::Error>> {
        let workers = front.query(&["workers"])?;
        Ok(workers["workers"].as_array().into_iter().flatten().map(|worker| worker["rxBytes"].as_u64().unwrap_or_default()).sum())
    };
    let before = received()?;
    let answer = outside.run(|| client::tcp(to, 3_000_000, PATIENCE))??;
    let passed = received()? - before;
    // The server sends back what it gets: acknowledgements alone would be some hundred kilobytes.
    assert!((3_000_000..4_500_000).contains(&passed), "{passed} bytes passed node-1, with 3,000,000 each way");
    let client = SocketAddr::new(outside.address(Family::V4), answer.seen.port()).to_string();
    for (node, kind) in [(front, "directReturn"), (back, "service")] {
        let flows = node.query(&["flows"])?;
        let flow = flows["flows"].as_array().into_iter().flatten().find(|flow| flow["client"] == client.as_str()).cloned();
        let flow = flow.ok_or_else(|| format!("{} has no flow of {client}: {flows}", node.name()))?;
        assert_eq!((&flow["kind"], &flow["dialled"]), (&kind.into(), &to.to_string().into()), "{}", node.name());
        assert_eq!(flow["seenAs"], client.as_str());
    }
    assert_eq!(front.query(&["peers"])?["peers"][0]["directReturn"], true);
    let from = SocketAddr::new(outside.address(Family::V4), 7).to_string();
    let trace = front.podgate(&["trace", "--from", &from, "--to", &to.to_string()])?;
    assert!(trace.contains("the reply leaves there"), "{trace}");
    Ok(())
}

fn inside(bed: &Bed) -> Outcome {
    let lab = lab(bed)?;
    let gateway = lab.node(1).gateway();
    for family in Family::BOTH {
        let to = dialled(lab, family);
        let pod = lab.pod("b1")?;
        assert_eq!(pod.machine().run(|| client::tcp(to, 1000, PATIENCE))??.seen.ip(), gateway.of(family), "a pod, as by kube-proxy");
        let node = lab.node(1).machine();
        assert_eq!(node.run(|| client::tcp(to, 1000, PATIENCE))??.seen.ip(), node.address(family), "the node itself");
        let other = lab.node(2).machine();
        assert_eq!(other.run(|| client::tcp(to, 1000, PATIENCE))??.server, "a2", "another node");
    }
    Ok(())
}

fn restarts(bed: &Bed) -> Outcome {
    let lab = lab(bed)?;
    let outside = lab.outside();
    let mut kept = Vec::new();
    for family in Family::BOTH {
        kept.push(Ticker::start(outside.netns(), dialled(lab, family), Duration::from_millis(5), Duration::from_secs(30))?);
    }
    for node in [lab.node(1), lab.node(2)] {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            lab.restart(node, signal)?;
            for ticker in &kept {
                let before = ticker.answered();
                wait_until(
                    PATIENCE,
                    || "a tick".into(),
                    || Ok((ticker.answered() <= before).then(|| format!("none after {signal} of {}", node.name()))),
                )?;
            }
        }
    }
    for ticker in kept {
        let report = ticker.finish();
        assert!(report.broken.is_none(), "{:?}", report.broken);
    }
    Ok(())
}

/// Node-1 itself sends to node-2's overlay port, from its own address and so as the peer that it is.
fn refused(bed: &Bed) -> Outcome {
    let lab = lab(bed)?;
    let (peer, node) = (lab.node(1).machine(), lab.node(2));
    let pod = lab.pod("a2")?;
    let reasons = ["overlay_foreign_source", "direct_return_refused"];
    for family in Family::BOTH {
        let overlay = SocketAddr::new(node.machine().address(family), 4790);
        let known = SocketAddr::new(peer.address(family), NODE_PORT);
        let outside = lab.outside().address(family);
        let inner_protocol = if family == Family::V4 { 1 } else { 2 };
        let sends = |source, to, text: &str| {
            let inner = raw::udp_packet(source, to, &[server::SPOOF_MARK, text.as_bytes()].concat());
            let header = [0x0c, 0, 0, inner_protocol, 0, 0, 2, 0];
            peer.run(|| client::send(overlay, &[&header[..], &inner[..]].concat()))
        };
        let before: Vec<u64> = reasons.iter().map(|reason| node.dropped(&[reason])).collect::<Result<_, _>>()?;
        for source in [lab.pod("a1")?.machine().address(family), pod.machine().address(family), peer.address(family), node.machine().address(family)]
        {
            sends(source, known, "handed on from inside")??;
        }
        let no_service = [
            SocketAddr::new(known.ip(), NODE_PORT + 700),
            SocketAddr::new(node.machine().address(family), NODE_PORT),
            pod.machine().addresses().server(family),
            SocketAddr::new(lab.service("web")?.vips.of(family), 80),
        ];
        for to in no_service {
            sends(outside, to, "handed on to no node port")??;
        }
        let counted = || -> Result<Option<String>, podgate::lab::LabError> {
            let now: Vec<u64> = reasons.iter().map(|reason| node.dropped(&[reason])).collect::<Result<_, _>>()?;
            let found: Vec<u64> = now.iter().zip(&before).map(|(now, before)| now - before).collect();
            Ok((found != [4, 4]).then(|| format!("{found:?} of {reasons:?} were counted")))
        };
        wait_until(PATIENCE, || format!("four drops of each name over {family}"), counted)?;
        // The same from a client to the service is delivered, so nothing else was wrong with the others.
        sends(outside, known, "handed on as it should be")??;
        let arrived = || {
            let delivered = lab.spoofs_delivered()?;
            Ok((!delivered.iter().any(|what| what.contains("handed on as it should be"))).then(|| format!("{delivered:?}")))
        };
        wait_until(PATIENCE, || "what is a client's".into(), arrived)?;
    }
    let delivered = lab.spoofs_delivered()?;
    assert!(!delivered.iter().any(|what| what.contains("from inside") || what.contains("no node port")), "{delivered:?}");
    Ok(())
}
