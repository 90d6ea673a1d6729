//! The package and its units under a real systemd, on two machines: what the gateway may do there and what it does, what becomes of it when it ends in
//! whichever way, and what is left when the package goes.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use podgate::lab::manifest::{self as objects, EndpointSpec, SERVICE_PORT, ServiceSpec, TrafficPolicy};
use podgate::lab::program::bulk::Ticker;
use podgate::lab::program::client;
use podgate::lab::program::ping::ping;
use podgate::lab::program::server::Server;
use podgate::lab::{Dual, Lab, LabError, Node, wait_until};
use podgate::netlink::Family;
use podgate_runtime::netns::Netns;
use podgate_testbed::traces::Host;
use podgate_testbed::vm::Vm;
use podgate_testbed::{Bed, Outcome};
use serde_json::Value;

use crate::documents::boot;
use crate::package::deb;
use crate::{Try, deploy};

/// A request that has no answer by then has failed, and so has a gateway that is not ready again.
const PATIENCE: Duration = Duration::from_secs(20);

/// The service that both machines serve; its only endpoint is on the second.
const VIPS: (&str, &str) = ("10.96.0.50", "fd00:96::50");

/// What neither the package nor the gateway may need.
const FIREWALLS: [&str; 4] = ["nft", "iptables", "ip6tables", "iptables-legacy"];

pub fn units(bed: &Bed) -> Outcome {
    let lab = Lab::builder(bed.sandbox(), &bed.binary()).named("systemd").nodes(2).machines()?;
    let package = deb(bed)?;
    let vms =
        lab.nodes().iter().map(|node| boot(node.machine(), &lab.directory().join("vm").join(node.name()), &package)).collect::<Try<Vec<_>>>()?;
    for (vm, program) in vms.iter().flat_map(|vm| FIREWALLS.map(|program| (vm, program))) {
        // They need not be installed at all; an error for another reason shows where they are used.
        let _ = fs::remove_file(vm.path("/usr/sbin").join(program));
    }
    let before = lab.nodes().iter().zip(&vms).map(|(node, vm)| left(node, vm)).collect::<Try<Vec<_>>>()?;

    let mut pods = Vec::new();
    for (node, vm) in lab.nodes().iter().zip(&vms) {
        install(&lab, node, vm)?;
        sandboxed(vm)?;
    }
    for vm in &vms {
        vm.ok("podgate doctor")?;
        pods.push(attach(vm, "a")?);
    }
    // The names by which servers tell who they are.
    let _servers = [Server::start("a1", &pods[0].0)?, Server::start("a2", &pods[1].0)?];
    lab.outside().serve()?;
    let web = ServiceSpec {
        name: "web".into(),
        vips: Dual { v4: VIPS.0.parse()?, v6: VIPS.1.parse()? },
        node_port: 30050,
        policy: TrafficPolicy::Cluster,
        endpoints: vec![EndpointSpec { addresses: pods[1].1, node: "node-2".into() }],
    };
    for vm in &vms {
        fs::write(vm.path("/etc/podgate/cluster.d/web.yaml"), objects::service(&web))?;
        wait_for(vm, "podgate backends", |said| said.matches("default/web:").count() == 4)?;
    }
    let [(first, _), (_, second)] = &pods[..] else { return Err("not two pods".into()) };
    everything_works(&lab, first, *second, &web)?;
    let looked = vms[0]
        .ok("podgate flows\npodgate drops\npodgate trace --from 192.0.2.1 --to 10.96.0.50:80\npodgate log-level debug\npodgate log-level info\n\
         curl -sSf http://127.0.0.1:10249/metrics\ncurl -sSf http://127.0.0.1:10256/healthz\nip netns exec podgate ip -br link")?;
    for word in ["default/web", "kubeproxy_sync_proxy_rules", "nodeEligible", "pods "] {
        assert!(looked.contains(word), "no {word:?} in {looked}");
    }

    // One connection through the first machine's gateway, for all that follows.
    let ticker = Ticker::start(first, SocketAddr::new(web.vips.v4.into(), SERVICE_PORT), Duration::from_millis(20), PATIENCE)?;
    let vm = &vms[0];
    let again = |what: &str, ends: &str| -> Outcome {
        let (pid, answered) = (main_pid(vm)?, ticker.answered());
        vm.ok(ends)?;
        // The state is asked for in the same breath as the process: it is the new one that is ready.
        wait_for(vm, "systemctl show --property=MainPID,ActiveState podgate; podgate status", |said| {
            said.contains("ActiveState=active") && !said.contains(&format!("MainPID={pid}\n")) && said.contains("  ready, ")
        })?;
        let now = ticker.answered();
        wait_until(PATIENCE, || format!("an answer after {what}"), || Ok((ticker.answered() <= now).then(|| format!("{answered} came before"))))?;
        everything_works(&lab, first, *second, &web).map_err(|error| format!("after {what}: {error}").into())
    };
    again("a restart", "systemctl restart podgate")?;
    again("its death", "systemctl kill --kill-whom=main --signal=KILL podgate")?;
    // The watchdog of the unit, in two seconds instead of thirty; the process that is stopped says nothing any more.
    vm.ok("mkdir -p /run/systemd/system/podgate.service.d\nprintf '[Service]\\nWatchdogSec=2\\n' > /run/systemd/system/podgate.service.d/watchdog.conf\nsystemctl daemon-reload")?;
    again("a new watchdog", "systemctl restart podgate")?;
    again("its silence", "systemctl kill --kill-whom=main --signal=STOP podgate")?;
    let journal = vm.ok("journalctl --no-pager --unit=podgate")?;
    assert!(journal.contains("Watchdog timeout") && !journal.contains("Operation not permitted"), "{journal}");
    vm.ok("rm -r /run/systemd/system/podgate.service.d\nsystemctl daemon-reload")?;
    again("an upgrade", "dpkg -i /root/podgate_*.deb")?;
    let report = ticker.finish();
    eprintln!("    one connection lived through all of it: {} answers, the longest pause {} ms", report.answered, report.longest_gap.as_millis());
    assert_eq!(report.broken, None);

    for ((node, vm), before) in lab.nodes().iter().zip(&vms).zip(before) {
        remove(node, vm, &before)?;
    }
    Ok(())
}

/// Installs the package, describes the node and starts the unit, as an operator does.
fn install(lab: &Lab, node: &Node, vm: &Vm) -> Outcome {
    vm.ok("apt install -y ./podgate_*.deb")?;
    let ranges = Lab::ranges();
    let config = format!(
        "underlay: {{interface: eth0}}\npodCIDRs: {}\nserviceCIDRs: {}\nsource: {{directory: /etc/podgate/cluster.d}}\nworkers: {{count: 2}}\n",
        ranges.pods, ranges.services
    );
    fs::write(vm.path("/etc/podgate/podgate.yaml"), config)?;
    let nodes: String = lab.nodes().iter().map(|node| objects::node(node.spec())).collect();
    fs::write(vm.path("/etc/podgate/cluster.d/nodes.yaml"), nodes)?;
    // `enable --now` returns when the gateway has said READY=1 (Type=notify).
    vm.ok("podgate config check\nsystemctl enable --now podgate\npodgate status --wait=20\npodgate install-cni")?;
    let shown = vm.ok("systemctl show podgate")?;
    for line in ["Type=notify", "ActiveState=active", "SubState=running", "NRestarts=0", "WatchdogUSec=30s", "StatusText=forwarding"] {
        assert!(shown.lines().any(|known| known == line), "{line} is not what systemd says of {}: {shown}", node.name());
    }
    Ok(())
}

fn main_pid(vm: &Vm) -> Try<String> {
    Ok(vm.ok("systemctl show --property=MainPID --value podgate")?.trim().to_owned())
}

/// The unit's sandbox is in force, as the kernel has it.
fn sandboxed(vm: &Vm) -> Outcome {
    let pid = main_pid(vm)?;
    let status = vm.ok(&format!("cat /proc/{pid}/status"))?;
    let unit = deploy("systemd/podgate.service")?;
    let wanted = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).ok_or("no CapabilityBoundingSet")?;
    // linux/capability.h.
    let numbers = [("CAP_NET_BIND_SERVICE", 10), ("CAP_NET_ADMIN", 12), ("CAP_NET_RAW", 13), ("CAP_SYS_ADMIN", 21)];
    let mask: u64 = numbers.iter().filter(|(name, _)| wanted.split_whitespace().any(|word| word == *name)).map(|(_, number)| 1 << number).sum();
    assert_eq!(wanted.split_whitespace().count(), mask.count_ones() as usize, "a capability that this test does not know: {wanted}");
    for line in [format!("CapBnd:\t{mask:016x}"), format!("CapEff:\t{mask:016x}"), "NoNewPrivs:\t1".into(), "Seccomp:\t2".into()] {
        assert!(status.lines().any(|known| known == line), "no {line:?} in {status}");
    }
    let inside = |command: &str| vm.sh(&format!("nsenter --target {pid} --mount -- {command}"));
    for path in ["/usr/new", "/etc/podgate/new"] {
        let ended = inside(&format!("touch {path}"))?;
        assert!(ended.printed().contains("Read-only file system"), "{path}: {}", ended.printed());
    }
    assert!(!vm.ok("ls /root")?.is_empty(), "the package lies there");
    assert_eq!(inside("ls /root")?.stdout, "", "the unit's home directories are not empty");
    let mounts = vm.ok(&format!("cat /proc/{pid}/mountinfo"))?;
    assert!(mounts.lines().any(|line| line.contains(" /proc ") && line.contains("hidepid=invisible")), "{mounts}");
    Ok(())
}

/// Makes a namespace and attaches it: the namespace, and its addresses.
fn attach(vm: &Vm, name: &str) -> Try<(Netns, Dual)> {
    let printed =
        vm.ok(&format!("ip netns add {name}\npodgate attach --netns /run/netns/{name} --name default/{name} --publish 8000:8080 --ingress-rate 1G"))?;
    let result: Value = serde_json::from_str(&printed)?;
    let address = |at: usize| result["ips"][at]["address"].as_str().and_then(|text| text.split('/').next()).unwrap_or_default().to_owned();
    Ok((vm.netns(&format!("/run/netns/{name}"))?, Dual { v4: address(0).parse()?, v6: address(1).parse()? }))
}

/// Pods of both machines, the service, its node port, a host port, and masquerade, in both families.
fn everything_works(lab: &Lab, pod: &Netns, other: Dual, web: &ServiceSpec) -> Outcome {
    for family in Family::BOTH {
        let node = |number: usize| lab.node(number).machine().address(family);
        let vip = SocketAddr::new(web.vips.of(family), SERVICE_PORT);
        let ask = |to: SocketAddr| move || client::tcp(to, 20_000, PATIENCE);
        for (what, answer, server) in [
            ("a pod to another machine's pod", pod.run(ask(other.server(family)))??, "a2"),
            ("a pod to the service", pod.run(ask(vip))??, "a2"),
            ("a machine to the service", lab.node(1).machine().run(ask(vip))??, "a2"),
            ("the outside to the node port", lab.outside().run(ask(SocketAddr::new(node(1), web.node_port)))??, "a2"),
            ("the outside to the host port", lab.outside().run(ask(SocketAddr::new(node(1), 8000)))??, "a1"),
        ] {
            assert_eq!(answer.server, server, "{what}, {family}");
        }
        let outside = lab.outside().addresses().server(family);
        let answer = pod.run(ask(outside))??;
        assert_eq!((answer.server.as_str(), answer.seen.ip()), ("outside", node(1)), "what leaves the cluster is masqueraded, {family}");
        // In fragments, and what no rule can match: both come and go by sockets, for which it needs a capability more.
        pod.run(|| client::udp(vip, 3000, 3, Duration::from_secs(1)))??;
        pod.run(|| ping(outside.ip(), 100, PATIENCE))??;
    }
    Ok(())
}

/// Waits until a command prints what is wanted, however it ends.
fn wait_for(vm: &Vm, command: &str, wanted: impl Fn(&str) -> bool) -> Outcome {
    let failed = |source| LabError::Program { what: command.to_owned(), source: std::io::Error::other(source) };
    let waited = wait_until(
        PATIENCE,
        || format!("`{command}` on {} to print what is wanted", vm.name()),
        || {
            let printed = vm.sh(command).map_err(failed)?.stdout;
            Ok((!wanted(&printed)).then_some(printed))
        },
    );
    waited.map_err(|error| format!("{error}\n{}", vm.journal(60)).into())
}

/// What could be left: of the machine's network, of its disk, and of its service manager.
#[derive(Debug)]
struct Left {
    host: Host,
    files: Vec<String>,
    units: String,
}

fn left(node: &Node, vm: &Vm) -> Try<Left> {
    let files = vm.written(&["/var/cache", "/var/lib/PackageKit", "/var/lib/apt", "/var/lib/dpkg"])?;
    let units = vm.ok("find /etc/systemd/system /run/podgate /run/netns 2>/dev/null | sort; systemctl list-units --all --no-legend 'podgate*'")?;
    Ok(Left { host: Host::of(node.machine())?, files, units })
}

/// Removes the package, then purges it.
fn remove(node: &Node, vm: &Vm, before: &Left) -> Outcome {
    let gone = |what: &str, kept: &[&str]| -> Outcome {
        let now = left(node, vm)?;
        let host = now.host.differs(&before.host);
        let more: Vec<_> = now.files.iter().filter(|file| !before.files.contains(file) && !kept.iter().any(|kept| file.starts_with(kept))).collect();
        let less: Vec<_> = before.files.iter().filter(|file| !now.files.contains(file)).collect();
        assert!(host.is_empty() && more.is_empty() && less.is_empty(), "{what} on {}: {host:#?}, {more:#?}, {less:#?}", vm.name());
        assert_eq!(now.units, before.units, "{what} on {}", vm.name());
        let processes = vm.sh("ps -e -o comm= | grep -c podgate")?;
        assert_eq!(processes.stdout.trim(), "0", "{what} leaves processes on {}", vm.name());
        Ok(())
    };
    vm.ok("ip netns delete a\napt remove -y podgate\nrmdir --ignore-fail-on-non-empty /run/netns || umount /run/netns && rmdir /run/netns")?;
    // The plugin's directory is one that container runtimes and other plugins share: it is made where there is none, and never taken away.
    gone("apt remove", &["/etc/podgate", "/opt/cni 4", "/opt/cni/bin 4", "/var/lib/podgate"])?;
    assert!(vm.path("/etc/podgate/podgate.yaml").exists() && vm.path("/var/lib/podgate").exists());
    vm.ok("rm /etc/podgate/cluster.d/*\napt purge -y podgate")?;
    gone("apt purge", &["/opt/cni 4", "/opt/cni/bin 4"])
}
