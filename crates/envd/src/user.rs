//! Who processes run as: `/etc/passwd` and `/etc/group`, read anew each time so that `useradd` in the guest counts at once.
//!
//! We parse them ourselves because the C library's lookup loads plug-ins at run time, which a static binary cannot.

use std::io;

/// One line of `/etc/passwd` with its groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub home: String,
    pub shell: String,
    /// All groups the user is in, the primary one first.
    pub groups: Vec<u32>,
}

/// Finds a user by name. `root` exists even where the files do not.
pub fn lookup(name: &str) -> io::Result<Option<User>> {
    Ok(find(&read("/etc/passwd")?, &read("/etc/group")?, name))
}

fn read(path: &str) -> io::Result<String> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// What the two files say about a user.
pub fn find(passwd: &str, group: &str, name: &str) -> Option<User> {
    let fallback = "root:x:0:0:root:/root:/bin/sh";
    let line = passwd.lines().chain([fallback]).find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).filter(|home| !home.is_empty()).unwrap_or("/").to_owned();
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh").to_owned();

    let mut groups = vec![gid];
    for line in group.lines() {
        let mut fields = line.split(':').skip(2);
        let Some(id) = fields.next().and_then(|id| id.parse().ok()) else { continue };
        let member = fields.next().is_some_and(|members| members.split(',').any(|member| member.trim() == name));
        if member && !groups.contains(&id) {
            groups.push(id);
        }
    }
    Some(User { name: name.to_owned(), uid, gid, home, shell, groups })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n# comment\nbroken\nnouid:x:a:0::/:/bin/sh\n\
        user:x:1000:1000:,,,:/home/user:/bin/bash\ndaemon:x:1:1:daemon::\n";
    const GROUP: &str =
        "root:x:0:\nsudo:x:27:other,user\nuser:x:1000:\nbad:x:zz:user\nwheel:x:28:user,\nuserx:x:29:userx\nshort\n";

    #[test]
    fn finds_a_user_with_all_groups() {
        let user = find(PASSWD, GROUP, "user").unwrap();
        assert_eq!((user.uid, user.gid, user.groups), (1000, 1000, vec![1000, 27, 28]));
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/user", "/bin/bash"));
    }

    #[test]
    fn fills_in_empty_fields() {
        let daemon = find(PASSWD, GROUP, "daemon").unwrap();
        assert_eq!((daemon.home.as_str(), daemon.shell.as_str()), ("/", "/bin/sh"));
    }

    #[test]
    fn refuses_the_unknown_and_the_broken() {
        for name in ["nobody", "", "broken", "nouid", "use", "# comment"] {
            assert_eq!(find(PASSWD, GROUP, name), None, "{name}");
        }
    }

    #[test]
    fn root_always_exists() {
        assert_eq!(find("", "", "root").unwrap().home, "/root");
        assert_eq!(find(PASSWD, GROUP, "root").unwrap().shell, "/bin/bash");
    }
}
