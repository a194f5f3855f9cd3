"""A program in a capsule for the proxy's tests: pages, redirects, a socket, events, and bodies of any size."""
import base64, hashlib, http.server, os, struct, sys, time

PAGE = b"""<!doctype html><meta charset=utf-8><link rel=icon href="data:,"><title>app</title><script>
const report = [];
async function all() {
  report.push(location.pathname);
  report.push((await (await fetch('/dir')).text()).trim());
  report.push(await new Promise((done, fail) => {
    const socket = new WebSocket(location.origin.replace('http', 'ws') + '/ws');
    socket.onopen = () => socket.send('socket');
    socket.onmessage = message => { done(message.data); socket.close(); };
    socket.onerror = fail;
  }));
  report.push(await new Promise((done, fail) => {
    const seen = [], events = new EventSource('/events');
    events.onmessage = message => { seen.push(message.data); if (seen.length == 3) { events.close(); done(seen.join('')); } };
    events.onerror = fail;
  }));
}
all().then(() => { window.report = report.join(' '); }, error => { window.report = 'error: ' + error; });
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def whole(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/":
            return self.whole(PAGE)
        if path == "/head":
            return self.whole(str(self.headers).encode())
        if path == "/events":
            return self.events()
        if path == "/ws":
            return self.socket()
        if path == "/big":
            return self.big(int(query))
        return super().do_GET()

    def do_POST(self):
        sum = hashlib.sha256()
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                sum.update(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers["Content-Length"])
            while left:
                piece = self.rfile.read(min(left, 1 << 16))
                left -= len(piece)
                sum.update(piece)
        self.whole(sum.hexdigest().encode())

    def events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        number = 0
        try:
            while True:
                self.wfile.write(b"data: %d\n\n" % number)
                number += 1
                time.sleep(0.05)
        except OSError:
            open("/tmp/left", "w").close()
        self.close_connection = True

    def big(self, mib):
        self.send_response(200)
        self.send_header("Content-Length", str(mib << 20))
        self.end_headers()
        for number in range(mib):
            self.wfile.write(bytes([number % 251]) * (1 << 20))

    def socket(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            first = self.rfile.read(2)
            if len(first) < 2:
                return
            kind, length = first[0] & 15, first[1] & 127
            if length == 126:
                length = struct.unpack(">H", self.rfile.read(2))[0]
            elif length == 127:
                length = struct.unpack(">Q", self.rfile.read(8))[0]
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[index % 4] for index, byte in enumerate(self.rfile.read(length)))
            head = bytes([0x80 | kind]) + (bytes([length]) if length < 126 else b"\x7e" + struct.pack(">H", length))
            self.wfile.write(head + data)
            if kind == 8:
                return


os.makedirs("/srv/www/dir", exist_ok=True)
os.chdir("/srv/www")
with open("dir/index.html", "w") as index:
    index.write("index")
server = http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler)
print("listening", flush=True)
server.serve_forever()
