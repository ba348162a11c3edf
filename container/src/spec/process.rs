//! The process of a container: command, environment, identity, limits.

use kiln_contract::{ExecSpec, InstanceRecord, Ulimit};
use oci_spec::runtime::{
    Capabilities, LinuxCapabilitiesBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, UserBuilder,
};

use super::{Identity, builder, hostname, option};
use crate::capabilities::CapabilitySet;
use crate::host::{self, Id};
use crate::runtime::RuntimeError;
use kiln_accounts::User;

/// Where commands are looked for unless the image says otherwise, as Docker has it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What container processes create files with, whatever the caller has.
pub(crate) const UMASK: u32 = 0o022;

/// A process, with everything looked up.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ProcessPlan {
    /// The command and its arguments; never empty.
    pub(crate) args: Vec<String>,
    /// `NAME=value`, each name once.
    pub(crate) env: Vec<String>,
    /// Absolute in the container.
    pub(crate) cwd: String,
    /// Who.
    pub(crate) user: User,
    /// What it may do.
    pub(crate) capabilities: CapabilitySet,
    /// Its programs cannot gain more.
    pub(crate) no_new_privileges: bool,
    /// Its limits.
    pub(crate) rlimits: Vec<PosixRlimit>,
    /// It has a terminal.
    pub(crate) terminal: bool,
}

/// The first process of an instance.
///
/// # Errors
/// [`RuntimeError::Invalid`] for settings that make no sense.
pub(crate) fn plan(record: &InstanceRecord, identity: &Identity) -> Result<ProcessPlan, RuntimeError> {
    let process = &record.spec.process;
    complete(
        record,
        identity.user.clone(),
        identity.capabilities,
        Given { args: &process.args, env: process.env.clone(), cwd: &process.cwd, terminal: process.tty },
    )
}

/// A further process of an instance; `user` and `capabilities` are already its own.
///
/// # Errors
/// [`RuntimeError::Invalid`] for settings that make no sense.
pub(crate) fn exec_plan(
    record: &InstanceRecord,
    exec: &ExecSpec,
    user: User,
    capabilities: CapabilitySet,
) -> Result<ProcessPlan, RuntimeError> {
    let mut env = record.spec.process.env.clone();
    for line in &exec.env {
        let name = line.split('=').next().unwrap_or(line);
        env.retain(|other| other.split('=').next() != Some(name));
        env.push(line.clone());
    }
    complete(
        record,
        user,
        capabilities,
        Given {
            args: &exec.args,
            env,
            cwd: exec.cwd.as_deref().unwrap_or(&record.spec.process.cwd),
            terminal: exec.tty,
        },
    )
}

struct Given<'a> {
    args: &'a [String],
    env: Vec<String>,
    cwd: &'a str,
    terminal: bool,
}

fn complete(
    record: &InstanceRecord,
    user: User,
    capabilities: CapabilitySet,
    given: Given<'_>,
) -> Result<ProcessPlan, RuntimeError> {
    if given.args.first().is_none_or(String::is_empty) {
        return Err(RuntimeError::Invalid("there is no command to run".into()));
    }
    if let Some(text) = given.args.iter().chain(&given.env).find(|text| text.contains('\0')) {
        return Err(RuntimeError::Invalid(format!("`{}` has a NUL byte in it", text.replace('\0', "\\0"))));
    }
    // Supplementary groups are another matter: who may have none just has none.
    for (what, kind, number) in [("user", Id::User, user.uid), ("group", Id::Group, user.gid)] {
        if !host::maps(kind, number) {
            return Err(RuntimeError::Unsupported(format!(
                "the {what} {number} is none of those that you may have in containers: /etc/subuid and /etc/subgid give \
                 no number for it (kiln system doctor)"
            )));
        }
    }
    let cwd = if given.cwd.is_empty() { "/" } else { given.cwd };
    if !cwd.starts_with('/') {
        return Err(RuntimeError::Invalid(format!("the working directory `{cwd}` is not absolute")));
    }
    let mut env = given.env;
    let mut default = |name: &str, value: &str| {
        if !env.iter().any(|line| line.split('=').next() == Some(name)) {
            env.push(format!("{name}={value}"));
        }
    };
    default("PATH", PATH);
    default("HOSTNAME", hostname(record));
    if given.terminal {
        default("TERM", "xterm");
    }
    // By this variable init systems know that they are in a container (systemd's «container interface»).
    default("container", "kiln");
    default("HOME", &user.home);
    Ok(ProcessPlan {
        args: given.args.to_vec(),
        env,
        cwd: cwd.to_owned(),
        user,
        capabilities,
        no_new_privileges: no_new_privileges(record)?,
        rlimits: record.spec.resources.ulimits.iter().map(rlimit).collect::<Result<_, _>>()?,
        terminal: given.terminal,
    })
}

/// Whether programs may gain privileges by set-user-id bits and file capabilities: not unless asked for, and always
/// in privileged containers, which would gain nothing by it.
///
/// # Errors
/// [`RuntimeError::Invalid`] for anything but a truth value.
pub(crate) fn no_new_privileges(record: &InstanceRecord) -> Result<bool, RuntimeError> {
    match option(record, "no-new-privileges") {
        None => Ok(!record.spec.security.privileged),
        Some("" | "true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => {
            Err(RuntimeError::Invalid(format!("`{other}` is neither true nor false (no-new-privileges)")))
        }
    }
}

fn rlimit(ulimit: &Ulimit) -> Result<PosixRlimit, RuntimeError> {
    use PosixRlimitType as Kind;
    let kind = match ulimit.name.as_str() {
        "as" => Kind::RlimitAs,
        "core" => Kind::RlimitCore,
        "cpu" => Kind::RlimitCpu,
        "data" => Kind::RlimitData,
        "fsize" => Kind::RlimitFsize,
        "locks" => Kind::RlimitLocks,
        "memlock" => Kind::RlimitMemlock,
        "msgqueue" => Kind::RlimitMsgqueue,
        "nice" => Kind::RlimitNice,
        "nofile" => Kind::RlimitNofile,
        "nproc" => Kind::RlimitNproc,
        "rss" => Kind::RlimitRss,
        "rtprio" => Kind::RlimitRtprio,
        "rttime" => Kind::RlimitRttime,
        "sigpending" => Kind::RlimitSigpending,
        "stack" => Kind::RlimitStack,
        other => {
            return Err(RuntimeError::Invalid(format!("`{other}` is not a resource limit (getrlimit(2))")));
        }
    };
    if ulimit.soft > ulimit.hard {
        return Err(RuntimeError::Invalid(format!(
            "the soft limit of `{}` is above its hard limit ({} > {})",
            ulimit.name, ulimit.soft, ulimit.hard
        )));
    }
    PosixRlimitBuilder::default().typ(kind).soft(ulimit.soft).hard(ulimit.hard).build().map_err(builder)
}

impl ProcessPlan {
    /// As the specification writes it.
    pub(crate) fn to_oci(&self) -> Result<Process, RuntimeError> {
        let set = self.capabilities.to_oci();
        // Inheritable and ambient stay empty: with them, set-user-id-less programs would hand capabilities on.
        // Others than root lose theirs with `execve`, and must not have them when it looks for the command.
        let held = if self.user.uid == 0 { set.clone() } else { Capabilities::default() };
        let capabilities = LinuxCapabilitiesBuilder::default()
            .bounding(set)
            .effective(held.clone())
            .permitted(held)
            .inheritable([])
            .ambient([])
            .build()
            .map_err(builder)?;
        let mut user = UserBuilder::default()
            .uid(self.user.uid)
            .gid(self.user.gid)
            .umask(UMASK)
            .additional_gids(self.user.groups.clone())
            .build()
            .map_err(builder)?;
        if self.user.groups.is_empty() {
            user.set_additional_gids(None);
        }
        ProcessBuilder::default()
            .terminal(self.terminal)
            .user(user)
            .args(self.args.clone())
            .env(self.env.clone())
            .cwd(&self.cwd)
            .capabilities(capabilities)
            .rlimits(self.rlimits.clone())
            .no_new_privileges(self.no_new_privileges)
            .build()
            .map_err(builder)
    }
}
