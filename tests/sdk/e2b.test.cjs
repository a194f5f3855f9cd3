// The published `e2b` npm package, unmodified, straight at one envd: its debug mode (E2B_DEBUG and E2B_SANDBOX_URL in the environment).
const { test, before } = require('node:test')
const assert = require('node:assert/strict')
const crypto = require('node:crypto')
const {
  AuthenticationError, CommandExitError, FileNotFoundError, FileType, InvalidArgumentError, NotEnoughSpaceError,
  NotFoundError, Sandbox, TimeoutError,
} = require('e2b')

let sandbox
before(async () => { sandbox = await Sandbox.create() })

/** A directory of the test's own. */
async function home(t) {
  const path = `/home/user/js-${t.name.replaceAll(/[^a-z]+/g, '-')}`
  assert.equal(await sandbox.files.makeDir(path), true)
  return path
}

/** Collects what a callback is called with; can be waited for. */
class Calls {
  all = []
  waiting = []
  add = (call) => { this.all.push(call); for (const wake of this.waiting.splice(0)) wake() }
  async until(done) { while (!done(this.all)) await new Promise((wake) => this.waiting.push(wake)) }
}

const limit = { timeout: 60_000 }

test('run', limit, async (t) => {
  assert.equal(await sandbox.isRunning(), true)
  const result = await sandbox.commands.run('echo out; echo err >&2')
  assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
  await assert.rejects(sandbox.commands.run('echo out; exit 3'), (error) => {
    assert(error instanceof CommandExitError)
    assert.deepEqual([error.stdout, error.exitCode], ['out\n', 3])
    return true
  })
})

test('user, directory and environment', limit, async (t) => {
  const path = await home(t)
  const run = async (command, options) => (await sandbox.commands.run(command, options)).stdout
  assert.equal(await run('id -un; pwd; echo $HOME'), 'user\n/home/user\n/home/user\n')
  assert.equal(await run('id -un; pwd', { user: 'root' }), 'root\n/root\n')
  assert.equal(await run('pwd; echo "$A"', { cwd: path, envs: { A: 'ça va? "$B"' } }), `${path}\nça va? "$B"\n`)
  await assert.rejects(run('pwd', { cwd: '/no/such/place' }), InvalidArgumentError)
  await assert.rejects(run('pwd', { user: 'root123' }), AuthenticationError)
})

test('output comes as it is produced', limit, async () => {
  const out = [], err = []
  const result = await sandbox.commands.run('for i in 1 2 3; do echo $i; echo e$i >&2; done', { onStdout: (data) => out.push(data), onStderr: (data) => err.push(data) })
  assert.equal(out.join(''), '1\n2\n3\n')
  assert.equal(err.join(''), 'e1\ne2\ne3\n')
  assert.equal(result.stdout, out.join(''))
})

test('output that is no text', limit, async () => {
  assert.equal((await sandbox.commands.run("printf 'a\\377b'")).stdout, 'a\ufffdb')
  assert.equal((await sandbox.commands.run("head -c 8191 /dev/zero | tr '\\0' a; printf '\\342'")).stdout, 'a'.repeat(8191) + '\ufffd')
  const result = await sandbox.commands.run('python3 -c \'print("\\u20ac" * 300001, end="")\'')
  assert.equal(result.stdout, '\u20ac'.repeat(300001))
})

test('many at once', limit, async () => {
  const results = await Promise.all(Array.from({ length: 64 }, (_, n) => sandbox.commands.run(`echo ${n}; seq 2000 | tail -n 1`)))
  assert.deepEqual(results.map((result) => result.stdout), Array.from({ length: 64 }, (_, n) => `${n}\n2000\n`))
})

test('timeout', limit, async () => {
  await assert.rejects(sandbox.commands.run('sleep 6543', { timeoutMs: 500 }), TimeoutError)
})

test('background, input, list and kill', limit, async () => {
  const handle = await sandbox.commands.run('cat; echo done', { background: true, stdin: true })
  assert((await sandbox.commands.list()).some((process) => process.pid === handle.pid))
  await sandbox.commands.sendStdin(handle.pid, 'text ')
  await handle.sendStdin(new TextEncoder().encode('and bytes\n'))
  await handle.closeStdin()
  assert.equal((await handle.wait()).stdout, 'text and bytes\ndone\n')
  const sleeper = await sandbox.commands.run('sleep 6543', { background: true })
  assert.equal(await sleeper.kill(), true)
  await assert.rejects(sleeper.wait(), CommandExitError)
  assert.equal(await sandbox.commands.kill(sleeper.pid), false)
  await assert.rejects(sandbox.commands.sendStdin(4194303, 'x'), NotFoundError)
})

test('connect', limit, async () => {
  const started = await sandbox.commands.run('read line; echo got $line; exit 4', { background: true, stdin: true })
  await started.disconnect()
  const again = await sandbox.commands.connect(started.pid)
  await again.sendStdin('more\n')
  await assert.rejects(again.wait(), (error) => error.exitCode === 4 && error.stdout === 'got more\n')
  await assert.rejects(sandbox.commands.connect(4194303), NotFoundError)
})

test('write and read', limit, async (t) => {
  const path = `${await home(t)}/a/b/file`
  for (const useOctetStream of [false, true]) {
    for (const content of ['', 'hello\n', 'ça va? \u20ac\u{1f600}', 'x'.repeat(1_000_000), 'short again']) {
      const info = await sandbox.files.write(path, content, { useOctetStream })
      assert.deepEqual([info.name, info.path, info.type], ['file', path, FileType.FILE])
      assert.equal(await sandbox.files.read(path), content)
    }
  }
  const bytes = crypto.randomBytes(2_000_000)
  const stream = () => new ReadableStream({ start(sink) { for (let at = 0; at < bytes.length; at += 10007) sink.enqueue(new Uint8Array(bytes.subarray(at, at + 10007))); sink.close() } })
  for (const data of [new Uint8Array(bytes).buffer, new Blob([bytes]), stream()]) {
    await sandbox.files.write(path, data)
    assert.deepEqual(Buffer.from(await sandbox.files.read(path, { format: 'bytes' })), bytes)
  }
  await sandbox.files.write(path, new Blob([bytes]), { gzip: true })
  assert.deepEqual(Buffer.from(await sandbox.files.read(path, { format: 'bytes', gzip: true })), bytes)
  assert.deepEqual(Buffer.from(await (await sandbox.files.read(path, { format: 'blob' })).arrayBuffer()), bytes)
  const chunks = []
  for await (const chunk of await sandbox.files.read(path, { format: 'stream' })) chunks.push(chunk)
  assert.deepEqual(Buffer.concat(chunks), bytes)
  await assert.rejects(sandbox.files.read(`${path}-none`), FileNotFoundError)
})

test('write many', limit, async (t) => {
  const path = await home(t)
  const files = Array.from({ length: 10 }, (_, n) => ({ path: `${path}/${n}/file`, data: `content ${n}` }))
  for (const useOctetStream of [false, true]) {
    const infos = await sandbox.files.write(files, { useOctetStream })
    assert.deepEqual(infos.map((info) => info.path), files.map((file) => file.path))
    for (const file of files) assert.equal(await sandbox.files.read(file.path), file.data)
  }
})

test('disk full', limit, async () => {
  await assert.rejects(sandbox.files.write('/mnt/js', new Blob([Buffer.alloc(2 << 20, 'x')])), NotEnoughSpaceError)
  assert.equal(await sandbox.files.exists('/mnt/js'), false)
})

test('directories and entries', limit, async (t) => {
  const path = await home(t)
  assert.equal(await sandbox.files.makeDir(`${path}/a/b`), true)
  assert.equal(await sandbox.files.makeDir(`${path}/a/b`), false)
  await sandbox.files.write(`${path}/a/b/file`, '12345', { metadata: { Kind: 'test' } })
  const listed = await sandbox.files.list(path, { depth: 3 })
  assert.deepEqual(listed.map((entry) => [entry.path, entry.type]), [[`${path}/a`, FileType.DIR], [`${path}/a/b`, FileType.DIR], [`${path}/a/b/file`, FileType.FILE]])
  const info = await sandbox.files.getInfo(`${path}/a/b/file`)
  assert.deepEqual([info.size, info.mode, info.owner, info.group, info.metadata], [5, 0o644, 'user', 'user', { kind: 'test' }])
  assert(Math.abs(info.modifiedTime.getTime() - Date.now()) < 60_000)
  assert.equal((await sandbox.files.rename(`${path}/a/b`, `${path}/c/d`)).path, `${path}/c/d`)
  assert.equal(await sandbox.files.exists(`${path}/a/b`), false)
  await sandbox.files.remove(`${path}/c`)
  assert.deepEqual((await sandbox.files.list(path)).map((entry) => entry.name), ['a'])
  await assert.rejects(sandbox.files.getInfo(`${path}/none`), FileNotFoundError)
  await assert.rejects(sandbox.files.list(`${path}/none`), FileNotFoundError)
})

test('watch', limit, async (t) => {
  const path = await home(t)
  const events = new Calls(), exits = new Calls()
  const watch = await sandbox.files.watchDir(path, events.add, { onExit: exits.add })
  await sandbox.files.write(`${path}/file`, 'content')
  await sandbox.commands.run('mv file other; rm other; mkdir last', { cwd: path })
  await events.until((all) => all.some((event) => event.name === 'last'))
  const seen = events.all.map((event) => `${event.name} ${event.type}`)
  assert.deepEqual(seen, ['file create', 'file chmod', 'file write', 'file rename', 'other create', 'other remove', 'last create'])
  assert.deepEqual(exits.all, [])
  await watch.stop()
  await exits.until((all) => all.length === 1)
  const ended = new Promise((resolve) => sandbox.files.watchDir(path, () => {}, { timeoutMs: 3000, onExit: resolve }))
  assert((await ended) instanceof TimeoutError)
  await assert.rejects(sandbox.files.watchDir(`${path}/none`, () => {}), FileNotFoundError)
  await assert.rejects(sandbox.files.watchDir('/etc/hostname', () => {}), InvalidArgumentError)
})

test('recursive watch', limit, async (t) => {
  const path = await home(t)
  await sandbox.files.makeDir(`${path}/a/b`)
  const events = new Calls()
  const watch = await sandbox.files.watchDir(path, events.add, { recursive: true, includeEntry: true })
  await sandbox.files.write(`${path}/a/b/file`, 'content')
  await sandbox.commands.run('mkdir new', { cwd: path })
  await events.until((all) => all.length >= 4)
  await sandbox.files.write(`${path}/new/file`, 'content')
  await sandbox.commands.run('mkdir last', { cwd: path })
  await events.until((all) => all.some((event) => event.name === 'last'))
  const seen = events.all.map((event) => `${event.name} ${event.type}`)
  assert.deepEqual(seen, ['a/b/file create', 'a/b/file chmod', 'a/b/file write', 'new create', 'new/file create', 'new/file chmod', 'new/file write', 'last create'])
  assert.equal(events.all[2].entry.path, `${path}/a/b/file`)
  await watch.stop()
})

test('terminal', limit, async (t) => {
  const path = await home(t)
  const shown = new Calls()
  const text = () => Buffer.concat(shown.all).toString()
  const until = (expected) => shown.until(() => text().includes(expected))
  const write = (pid, input) => sandbox.pty.sendInput(pid, new TextEncoder().encode(input))
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData: shown.add, cwd: path, envs: { MARK: 'here' } })
  await write(terminal.pid, 'stty size; pwd; echo $MARK-$TERM\n')
  await until(`24 80\r\n${path}\r\nhere-xterm-256color\r\n`)
  await sandbox.pty.resize(terminal.pid, { cols: 132, rows: 43 })
  await write(terminal.pid, 'stty size; MARK=still\n')
  await until('43 132\r\n')
  await terminal.disconnect()
  const again = await sandbox.pty.connect(terminal.pid, { onData: shown.add })
  await write(again.pid, 'echo $MARK-there\n')
  await until('still-there\r\n')
  assert.equal(await sandbox.pty.kill(terminal.pid), true)
  await assert.rejects(again.wait(), CommandExitError)
  assert.equal(await sandbox.pty.kill(terminal.pid), false)
})
