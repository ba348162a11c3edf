//! The whole specification of a workload.

use std::path::Path;
use std::time::Duration;

use kiln_contract::{
    Digest, InstanceSpec, Isolation, MachineSpec, NetworkSpec, ProcessSpec, Resources, RestartPolicy,
    RuntimeChoice, SecuritySpec, StopSpec,
};

use super::{Host, ImageSettings, Map, ResolveError, Result};
use super::{command, environment, health, labels, mounts, names, network, ports, resources, signal};
use crate::commands::workload::WorkloadArgs;

/// What is known of the image.
#[derive(Debug, Clone)]
pub(crate) struct ImageFacts {
    /// Its id.
    pub(crate) id: Digest,
    /// Its layers, bottom first.
    pub(crate) layers: Vec<Digest>,
    /// Its settings.
    pub(crate) settings: ImageSettings,
}

/// Merges what was typed with what the image says. `name` is the one that was given or chosen.
pub(crate) fn instance_spec(
    args: &WorkloadArgs,
    name: &str,
    image: &ImageFacts,
    host: &Host<'_>,
) -> Result<InstanceSpec> {
    names::check_name("--name", name)?;
    let hostname = args.network.hostname.clone().filter(|name| !name.is_empty());
    hostname.as_deref().map_or(Ok(()), names::check_hostname)?;
    if args.rm && args.restart != RestartPolicy::No {
        return Err(ResolveError::Conflict(format!(
            "--rm excludes --restart {}: what is removed cannot be started again",
            args.restart
        )));
    }
    let settings = &image.settings;
    let process = process(args, settings, host)?;
    let system = args.machine.vm && (args.process.init || is_init(&process.args));
    Ok(InstanceSpec {
        name: name.to_owned(),
        isolation: if args.machine.vm { Isolation::Machine } else { Isolation::Container },
        image: args.image().to_owned(),
        image_id: image.id,
        layers: image.layers.clone(),
        hostname,
        mounts: mounts::mounts(settings, mount_words(args), host)?,
        network: NetworkSpec { allow: args.network.allow.clone(), ..network::network(network_words(args))? },
        ports: ports::ports(settings, &args.network.publish, args.network.publish_all, &args.network.expose)?,
        resources: limits(args)?,
        security: security(args, host)?,
        restart: args.restart,
        stop: stop(args, settings, system)?,
        health: health::health_check(settings.healthcheck.as_ref(), &settings.shell, &health_words(args))?,
        labels: labels::labels(&settings.labels, &args.label_file, &args.label, host)?,
        init: args.process.init,
        remove: args.rm,
        transient: false,
        runtime: runtime(&args.runtime, host)?,
        machine: MachineSpec {
            kernel: args.machine.kernel.clone(),
            disk: args.machine.disk,
            hypervisor: args.machine.hypervisor,
            cold: args.machine.cold,
            system,
        },
        process,
    })
}

/// A system's init, if nothing else is said.
const INIT: &str = "/sbin/init";

/// Whether a command is a system's init by its path.
fn is_init(command: &[String]) -> bool {
    const KNOWN: [&str; 5] =
        [INIT, "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/init"];
    command.first().is_some_and(|program| KNOWN.contains(&program.as_str()))
}

fn process(args: &WorkloadArgs, image: &ImageSettings, host: &Host<'_>) -> Result<ProcessSpec> {
    let typed = environment::Typed { files: &args.process.env_file, variables: &args.process.env };
    // As Docker: an empty one, from a script's empty variable, is none.
    let typed_cwd = args.process.workdir.as_deref().filter(|cwd| !cwd.is_empty());
    let cwd = typed_cwd.unwrap_or(&image.working_dir);
    if typed_cwd.is_some() && !cwd.starts_with('/') {
        return Err(ResolveError::value("--workdir", cwd, "it must be an absolute path in the container"));
    }
    let typed_command = match args.command() {
        [] if args.machine.vm && args.process.init => &[INIT.to_owned()][..],
        typed => typed,
    };
    let command = command::arguments(args.image(), image, args.process.entrypoint.as_deref(), typed_command)?;
    // Some builders write a relative one; it has always meant «from the root».
    let cwd = if cwd.starts_with('/') { cwd.to_owned() } else { format!("/{cwd}") };
    Ok(ProcessSpec {
        args: command,
        env: environment::environment(&image.env, typed, args.tty, host)?,
        cwd,
        user: args.process.user.clone().unwrap_or_else(|| image.user.clone()),
        groups: args.process.group_add.clone(),
        tty: args.tty,
        stdin: args.interactive,
    })
}

fn stop(args: &WorkloadArgs, image: &ImageSettings, system: bool) -> Result<StopSpec> {
    let mut default = StopSpec::default();
    if system {
        // What systemd gives each of its services (`DefaultTimeoutStopSec=`, systemd-system.conf(5)).
        default.timeout = Duration::from_secs(90);
    }
    let signal = match &args.stop_signal {
        Some(typed) => signal::signal_name(signal::parse_signal("--stop-signal", typed)?),
        // A damaged image's signal is not the user's mistake: it stops as others do.
        None => signal::parse_signal("the image's StopSignal", &image.stop_signal)
            .map_or(default.signal, signal::signal_name),
    };
    Ok(StopSpec { signal, timeout: args.stop_timeout.map_or(default.timeout, |given| given.0) })
}

fn limits(args: &WorkloadArgs) -> Result<Resources> {
    let typed = &args.resources;
    Ok(Resources {
        cpus: typed.cpus,
        cpu_shares: typed.cpu_shares,
        cpuset: typed.cpuset_cpus.as_deref().map(resources::cpuset).transpose()?,
        memory: resources::memory(typed.memory)?,
        memory_swap: resources::memory_swap(typed.memory, typed.memory_swap.as_deref())?,
        pids: resources::pids(typed.pids_limit),
        ulimits: typed.ulimit.iter().map(|text| resources::ulimit(text)).collect::<Result<_>>()?,
        shm_size: args.files.shm_size,
    })
}

fn security(args: &WorkloadArgs, host: &Host<'_>) -> Result<SecuritySpec> {
    let typed = &args.security;
    let options = typed.security_opt.iter().map(|text| security_option(text, host)).collect::<Result<_>>()?;
    if let Some(word) = typed.sysctl.iter().find(|word| !word.contains('=')) {
        return Err(ResolveError::value("--sysctl", word, "it is name=value"));
    }
    let sysctls: Map = labels::label_map("--sysctl", &typed.sysctl)?;
    Ok(SecuritySpec {
        cap_add: typed.cap_add.clone(),
        cap_drop: typed.cap_drop.clone(),
        privileged: typed.privileged,
        options,
        sysctls,
        devices: args.files.device.clone(),
        read_only: args.files.read_only,
    })
}

/// A profile's path is made absolute: whoever starts the container later stands elsewhere.
fn security_option(text: &str, host: &Host<'_>) -> Result<String> {
    let text =
        text.replacen("no-new-privileges:", "no-new-privileges=", 1).replacen("seccomp:", "seccomp=", 1);
    match text.split_once('=').unwrap_or((&text, "")) {
        ("seccomp", "unconfined")
        | ("no-new-privileges", "" | "true" | "false")
        | ("systempaths", "unconfined") => Ok(text),
        ("seccomp", file) if !file.is_empty() => {
            Ok(format!("seccomp={}", host.absolute("--security-opt", Path::new(file))?.display()))
        }
        ("label" | "apparmor", _) => Err(ResolveError::value(
            "--security-opt",
            &text,
            "SELinux labels and AppArmor profiles are not set by Kiln",
        )),
        _ => Err(ResolveError::value(
            "--security-opt",
            &text,
            "the options are no-new-privileges, seccomp=unconfined, seccomp=FILE, systempaths=unconfined",
        )),
    }
}

fn runtime(text: &str, host: &Host<'_>) -> Result<RuntimeChoice> {
    let bad = |why| ResolveError::value("--runtime", text, why);
    match text {
        "native" => Ok(RuntimeChoice::Native),
        "" => Err(bad("it is empty")),
        path if path.contains('/') => {
            Ok(RuntimeChoice::External(host.absolute("--runtime", Path::new(path))?))
        }
        name => {
            let found = (host.find_program)(name);
            found.map(RuntimeChoice::External).ok_or_else(|| bad("there is no such program in $PATH"))
        }
    }
}

fn mount_words(args: &WorkloadArgs) -> mounts::Typed<'_> {
    mounts::Typed { volumes: &args.files.volume, mounts: &args.files.mount, tmpfs: &args.files.tmpfs }
}

fn network_words(args: &WorkloadArgs) -> network::Typed<'_> {
    let typed = &args.network;
    network::Typed {
        network: typed.network.as_deref(),
        aliases: &typed.network_alias,
        address: typed.ip,
        add_hosts: &typed.add_host,
        dns: &typed.dns,
        dns_search: &typed.dns_search,
        dns_options: &typed.dns_option,
    }
}

fn health_words(args: &WorkloadArgs) -> health::Typed {
    let typed = &args.health;
    health::Typed {
        none: typed.no_healthcheck,
        command: typed.health_cmd.clone(),
        interval: typed.health_interval,
        timeout: typed.health_timeout,
        start_period: typed.health_start_period,
        start_interval: typed.health_start_interval,
        retries: typed.health_retries,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::testing::with_host;
    use super::*;

    #[derive(Parser)]
    #[command(disable_help_flag = true)]
    struct Line {
        #[command(flatten)]
        args: WorkloadArgs,
    }

    fn spec(image: &str, words: &[&str]) -> std::result::Result<InstanceSpec, String> {
        let line = Line::try_parse_from([&["run"], words].concat()).map_err(|error| error.to_string())?;
        let facts = ImageFacts {
            id: Digest::of(b"config"),
            layers: vec![Digest::of(b"layer")],
            settings: serde_json::from_str(image).unwrap(),
        };
        with_host(&[], |host| instance_spec(&line.args, "n", &facts, host)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_image_fills_what_was_not_typed() {
        let image =
            r#"{"User":"www","WorkingDir":"/srv","Cmd":["serve"],"StopSignal":"SIGQUIT","Labels":{"a":"1"}}"#;
        let got = spec(image, &["img"]).unwrap();
        assert_eq!(got.process.args, ["serve"]);
        assert_eq!((got.process.user.as_str(), got.process.cwd.as_str()), ("www", "/srv"));
        assert_eq!(got.stop, StopSpec { signal: "SIGQUIT".into(), ..Default::default() });
        assert_eq!(got.labels["a"], "1");
        assert_eq!(got.network.mode, "default");
        let got = spec(image, &["-u", "0:0", "-w", "/", "--stop-signal", "9", "--stop-timeout", "3", "img"])
            .unwrap();
        assert_eq!((got.process.user.as_str(), got.process.cwd.as_str()), ("0:0", "/"));
        assert_eq!((got.stop.signal.as_str(), got.stop.timeout.as_secs()), ("SIGKILL", 3));
    }

    #[test]
    fn flags_after_the_image_belong_to_the_command() {
        let got = spec("{}", &["--rm", "img", "ls", "--rm", "-v", "/x:/y", "--", "z"]).unwrap();
        assert_eq!(got.process.args, ["ls", "--rm", "-v", "/x:/y", "--", "z"]);
        assert!(got.mounts.is_empty() && got.remove);
        // Of an image with an entrypoint, a command often begins with a flag.
        let image = r#"{"Entrypoint":["git"]}"#;
        for (words, args) in [
            (&["img", "--help"][..], &["git", "--help"][..]),
            (&["img", "--rm", "-v", "x"], &["git", "--rm", "-v", "x"]),
            (&["img", "--unknown"], &["git", "--unknown"]),
            (&["img", "--", "log"], &["git", "log"]),
            (&["--", "img", "log"], &["git", "log"]),
            (&["img"], &["git"]),
        ] {
            let got = spec(image, words).unwrap();
            assert_eq!(got.process.args, args);
            assert!(!got.remove);
        }
        assert!(spec(image, &["--unknown", "img"]).is_err());
    }

    #[test]
    fn short_flags_combine_as_in_docker() {
        let got =
            spec("{}", &["-it", "-hbox", "-eA=1", "-p80:80", "-v.:/src", "-m64m", "-l", "x=y", "img", "sh"])
                .unwrap();
        assert!(got.process.tty && got.process.stdin);
        assert_eq!(got.hostname.as_deref(), Some("box"));
        assert_eq!(got.ports[0].host_port, 80);
        assert_eq!(got.mounts[0].target, "/src");
        assert_eq!(got.resources.memory.map(kiln_contract::ByteSize::bytes), Some(64 << 20));
        assert_eq!(got.labels["x"], "y");
    }

    #[test]
    fn what_is_empty_is_as_if_it_were_not_typed() {
        let got = spec(r#"{"WorkingDir":"/srv"}"#, &["-w", "", "-u", "", "img", "x"]).unwrap();
        assert_eq!((got.process.cwd.as_str(), got.process.user.as_str()), ("/srv", ""));
    }

    #[test]
    fn runtimes_are_found_in_the_path() {
        let choice = |words: &[&str]| spec("{}", &[words, &["img", "x"]].concat()).map(|spec| spec.runtime);
        assert_eq!(choice(&[]), Ok(RuntimeChoice::Native));
        assert_eq!(choice(&["--runtime", "runc"]), Ok(RuntimeChoice::External("/usr/bin/runc".into())));
        assert_eq!(choice(&["--runtime", "./crun"]), Ok(RuntimeChoice::External("/work/./crun".into())));
        assert!(choice(&["--runtime", "nope"]).is_err());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let table: [&[&str]; 12] = [
            &["--hostname", "a b", "img", "x"],
            &["--hostname", "a234567890123456789012345678901234567890123456789012345678901234x", "img", "x"],
            &["--sysctl", "net.core.somaxconn", "img", "x"],
            &["--rm", "--restart", "always", "img", "x"],
            &["-w", "relative", "img", "x"],
            &["--security-opt", "magic", "img", "x"],
            &["--stop-signal", "HURRY", "img", "x"],
            &["--network", "none", "--ip", "10.0.0.1", "img", "x"],
            &["--cpus", "0", "img", "x"],
            &["--sysctl", "=1", "img", "x"],
            &["--restart", "sometimes", "img", "x"],
            &["img"],
        ];
        for words in table {
            assert!(spec("{}", words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn security_options_are_normal_and_profiles_absolute() {
        let got = spec(
            "{}",
            &[
                "--security-opt",
                "no-new-privileges:true",
                "--security-opt",
                "seccomp=p.json",
                "--pids-limit",
                "-1",
                "img",
                "x",
            ],
        )
        .unwrap();
        assert_eq!(got.security.options, ["no-new-privileges=true", "seccomp=/work/p.json"]);
        assert_eq!(got.resources.pids, None);
    }
}
