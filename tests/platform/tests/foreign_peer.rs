//! A node without Podgate, with nothing but Linux's own `vxlan … gpe external` device, as a peer.

use std::process::{Command, ExitCode};
use std::time::Duration;

use podgate::lab::matrix::Probe;
use podgate::lab::program::{bulk, client, ping};
use podgate::lab::wait_until;
use podgate::netlink::Family;
use podgate_runtime::ethtool::{self, Switch};
use podgate_testbed::{Bed, Need, Outcome, all_hold, run};

const PATIENCE: Duration = Duration::from_secs(2);
/// Where its "pods" are: addresses on the tunnel device.
const V4: &str = "10.244.100.2";
const V6: &str = "fd00:77:100::2";

fn main() -> ExitCode {
    run(|tests| {
        tests.add_if(Need::Program("ip"), "a stock Linux VXLAN-GPE device exchanges traffic with a node, both ways", stock_peer);
    })
}

fn stock_peer(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let stock = lab.add_machine("stock", 100)?;
    let ip = |arguments: &str| -> Outcome {
        let status = stock.run(|| Command::new("ip").args(arguments.split_whitespace()).status())??;
        if status.success() { Ok(()) } else { Err(format!("`ip {arguments}` failed").into()) }
    };
    // As an administrator would: the inner packet directly in VXLAN-GPE, one route for each node's pods.
    ip("link add gpe0 type vxlan gpe external dstport 4790")?;
    ip("link set gpe0 up mtu 1440")?;
    ip(&format!("addr add {V4}/32 dev gpe0"))?;
    ip(&format!("-6 addr add {V6}/128 dev gpe0 nodad"))?;
    for node in lab.nodes() {
        let underlay = node.machine().addresses().v4;
        let cidrs = &node.spec().pod_cidrs;
        ip(&format!("route add {} encap ip id 1 dst {underlay} dev gpe0 src {V4}", cidrs[0]))?;
        ip(&format!("-6 route add {} encap ip id 1 dst {underlay} dev gpe0 src {V6}", cidrs[1]))?;
    }
    // A veth is no wire: it hands over packets whose inner checksum is still to be filled in by hardware, and a socket on the other
    // end, being no network device, never does. So the stock node fills them in itself, as its NIC would.
    stock.run(|| ethtool::set_features("eth0", &[("tx-checksum-ip-generic", Switch::Off)]))??;
    let v4 = stock.addresses().v4;
    for node in lab.nodes() {
        node.write_manifest(
            "stock.yaml",
            &format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: stock}}\nspec: {{podCIDR: 10.244.100.0/24, podCIDRs: [10.244.100.0/24, \"fd00:77:100::/64\"]}}\n\
                 status: {{addresses: [{{type: InternalIP, address: {v4}}}]}}\n"
            ),
        )?;
    }
    stock.serve()?;
    for pod in lab.pods() {
        for (family, address) in [(Family::V4, V4), (Family::V6, V6)] {
            let theirs: std::net::IpAddr = address.parse()?;
            let to = std::net::SocketAddr::new(theirs, podgate::lab::program::PORT);
            let (machine, ours) = (pod.machine(), pod.machine().addresses().server(family));
            wait_until(
                PATIENCE,
                || format!("the peer for {}", pod.name()),
                || Ok(machine.run(|| ping::ping(theirs, 56, Duration::from_millis(300)))?.err().map(|error| error.to_string())),
            )?;
            let answers = [machine.run(|| client::tcp(to, 300_000, PATIENCE))?, machine.run(|| client::udp(to, 9000, 2, PATIENCE))?];
            for answer in answers {
                assert_eq!(answer?.seen.ip(), machine.address(family), "{} to the stock node", pod.name());
            }
            let answers = [stock.run(|| client::tcp(ours, 300_000, PATIENCE))?, stock.run(|| client::udp(ours, 9000, 2, PATIENCE))?];
            for answer in answers {
                assert_eq!(answer?.seen.ip(), theirs, "the stock node to {}", pod.name());
            }
            for (from, to) in [(machine, to), (&stock, ours)] {
                let transfer = from.run(|| bulk::send(to, 16 << 20, Duration::from_secs(20)))??;
                eprintln!("    {} to {to}: {:.2} Gb/s", from.name(), transfer.gbit_per_s());
            }
        }
    }
    // The others are as they were.
    all_hold(&lab.check_paths(&lab.paths()?, &[Probe::Tcp], &|_, _| {})?)
}
