//! `kiln ssh-config`, and what every client must be told.

use std::path::{Path, PathBuf};

use clap_complete::engine::ArgValueCompleter;
use kiln_contract::{InstanceRecord, Isolation, RuntimeBackend as _};
use kiln_machine::SshAccess;

use crate::backends::Backends;
use crate::complete;
use crate::context::Context;
use crate::error::{CliError, Result};
use crate::exit::{self, Exit};
use crate::output::Out;

/// Print the configuration with which ssh, scp, sftp, rsync and editors reach a machine
///
/// A block of ssh_config(5) for the machine, or for every machine. It need not run yet, and its image needs no SSH server.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kiln ssh-config >> ~/.ssh/config\n  kiln ssh-config dev > dev.conf && scp -F dev.conf file dev:/tmp/"
)]
pub(crate) struct Args {
    /// Its name or id; none: all machines
    #[arg(value_name = "MACHINE", add = ArgValueCompleter::new(complete::instances))]
    machine: Option<String>,
    #[command(flatten)]
    login: LoginArgs,
}

/// Who logs in, and how he proves it.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct LoginArgs {
    /// Log in as this user (that of the image)
    #[arg(short = 'l', long = "login", value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Log in with this private key; the public one is FILE.pub (a key that Kiln makes)
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_key: Option<PathBuf>,
}

impl Args {
    pub(crate) fn run(self, context: &Context) -> Result<Exit> {
        let instances = context.instances()?;
        let records: Vec<InstanceRecord> = match &self.machine {
            Some(name) => vec![context.instance(&instances, name)?],
            None => {
                let all = instances.list()?;
                all.into_iter().filter(|record| record.spec.isolation == Isolation::Machine).collect()
            }
        };
        let mut out = Out::new();
        let mut first = true;
        for record in &records {
            // One image with an odd user must not take the configuration of all other machines away.
            let own = &record.spec.process.user;
            if self.machine.is_none() && self.login.user.is_none() && !own.is_empty() && !is_login(own) {
                let warning = format!("{} is left out: {}", record.spec.name, odd(own));
                exit::print_line("warning", &warning);
                continue;
            }
            if !std::mem::take(&mut first) {
                out.line("")?;
            }
            out.line(format!("Host {0} {0}.kiln.internal", record.spec.name))?;
            for (name, value) in options(context, &instances, record, &self.login)? {
                out.line(format!("    {name} {value}"))?;
            }
        }
        out.flush()?;
        Ok(Exit::SUCCESS)
    }
}

/// Names and values, as ssh_config(5) has them.
pub(crate) fn options(
    context: &Context,
    instances: &Backends,
    record: &InstanceRecord,
    login: &LoginArgs,
) -> Result<Vec<(&'static str, String)>> {
    let access = instances.machines().ssh_access(record)?;
    let user = login.user.as_deref().unwrap_or(&access.user);
    if !is_login(user) {
        let why = format!("cannot log in to {}: {}", record.spec.name, odd(user));
        return Err(CliError::failed(why).with_hint("name another with `--login USER`"));
    }
    let program = std::env::current_exe()
        .map_err(|error| CliError::file("cannot tell where this program is", error))?;
    let key = match &login.ssh_key {
        Some(path) => Some(
            std::path::absolute(path)
                .map_err(|error| CliError::file(format!("cannot use the key {}", path.display()), error))?,
        ),
        None => None,
    };
    if let Some(key) = key.as_ref().filter(|key| !public(key).exists()) {
        let public = public(key);
        return Err(CliError::failed(format!(
            "cannot log in with {}: there is no {}",
            key.display(),
            public.display()
        ))
        .with_hint(format!(
            "make it with `ssh-keygen -y -f {} > {}`",
            key.display(),
            public.display()
        )));
    }
    Ok(of(&access, &program, context.home().path(), login.user.as_deref(), key.as_deref()))
}

/// Whether a user's name may stand in a configuration. That of an image is whatever its maker wrote, and nobody has looked for it
/// in the image before a machine runs: a line break in it would make the rest options of his own for this host's ssh.
fn is_login(user: &str) -> bool {
    let begins = user.starts_with(|first: char| first.is_alphanumeric() || first == '_');
    begins && user.chars().all(|c| c.is_alphanumeric() || "_.-+@:".contains(c))
}

fn odd(user: &str) -> String {
    format!("its user {user:?} is not a name that ssh can be told")
}

fn public(key: &Path) -> PathBuf {
    let mut name = key.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

fn of(
    access: &SshAccess,
    program: &Path,
    home: &Path,
    user: Option<&str>,
    key: Option<&Path>,
) -> Vec<(&'static str, String)> {
    let mut proxy = vec![shell_word(program), "--home".to_owned(), shell_word(home), "ssh-proxy".to_owned()];
    if let Some(key) = key {
        proxy.extend(["--key".to_owned(), shell_word(&public(key))]);
    }
    proxy.push(access.id.to_string());
    vec![
        ("HostName", access.name.clone()),
        ("User", user.unwrap_or(&access.user).to_owned()),
        ("IdentityFile", quoted(key.unwrap_or(&access.identity))),
        ("IdentitiesOnly", "yes".to_owned()),
        ("HostKeyAlias", access.alias.clone()),
        ("UserKnownHostsFile", quoted(&access.known_hosts)),
        ("GlobalKnownHostsFile", "/dev/null".to_owned()),
        ("StrictHostKeyChecking", "yes".to_owned()),
        ("CheckHostIP", "no".to_owned()),
        // The server has neither; one that a workload has put in its place must not get them from a user's `Host *`.
        ("ForwardAgent", "no".to_owned()),
        ("ForwardX11", "no".to_owned()),
        ("ProxyCommand", proxy.join(" ")),
    ]
}

/// A path as a value: `%` begins a token there.
fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.to_string_lossy().replace('%', "%%"))
}

/// A path as a word of a command that a shell will read.
fn shell_word(path: &Path) -> String {
    let path = path.to_string_lossy().replace('%', "%%");
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@,=%".contains(c);
    if path.chars().all(plain) { path } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_name_that_would_be_more_than_a_name_is_refused() {
        for good in ["root", "app", "_apt", "1000", "1000:1000", "www-data", "me@domain", "müller"] {
            assert!(is_login(good), "{good}");
        }
        for bad in [
            "",
            "root\n    ProxyCommand touch /tmp/x",
            "root\rHost *",
            "root ProxyCommand=x",
            "\"root",
            "a\\b",
            "-oProxyCommand=x",
            "%h",
            "${HOME}",
            "a#b",
            "a=b",
            "a\u{2028}b",
            "$(id)",
            "`id`",
        ] {
            assert!(!is_login(bad), "{bad:?}");
        }
    }

    #[test]
    fn paths_with_blanks_quotes_and_percents_stay_what_they_are() {
        let access = SshAccess {
            id: kiln_contract::InstanceId::random(),
            name: "dev".to_owned(),
            user: "root".to_owned(),
            identity: "/a b/100%/id".into(),
            alias: "kiln-x".to_owned(),
            known_hosts: "/a b/known".into(),
        };
        let lines = of(&access, Path::new("/it's/kiln"), Path::new("/a b/100%"), Some("me"), None);
        let value = |name: &str| lines.iter().find(|line| line.0 == name).unwrap().1.as_str();
        assert_eq!(value("User"), "me");
        assert_eq!(value("IdentityFile"), "\"/a b/100%%/id\"");
        let proxy = format!(r"'/it'\''s/kiln' --home '/a b/100%%' ssh-proxy {}", access.id);
        assert_eq!(value("ProxyCommand"), proxy);
        let own = of(&access, Path::new("/kiln"), Path::new("/h"), None, Some(Path::new("/k")));
        assert!(own.contains(&("IdentityFile", "\"/k\"".to_owned())));
        assert!(own.last().unwrap().1.contains("--key /k.pub "), "{own:?}");
    }
}
