"""A WatchdogQueue peer that shares no code with ours: kazoo doing to the nodes what the Perl module does to them.

Started as `foreign_client.py SERVERS ROOT`. Reads one call a line as a JSON list, name first, and answers each with one line of JSON.
Like the Perl module it reads 1,023 bytes of a node and takes ages from its own clock.
"""

import json
import sys
import time

from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError


class Peer:
    def __init__(self, servers, root):
        # Longer than a busy machine keeps a process or the servers waiting.
        self.zk = KazooClient(hosts=servers, timeout=60)
        self.zk.start(timeout=300)
        self.root = root
        self.timer = 120
        self.own = None

    def path(self, name):
        return self.root + "/" + name

    def names(self, prefix=""):
        return [name for name in self.zk.get_children(self.root) if name.startswith(prefix)]

    # A master's calls.

    def create_queue(self, timer, items, sync_start):
        self.timer = timer
        self.zk.create(self.root, b"watchdog")
        for item in items:
            self.zk.create(self.path("queue-"), item.encode(), sequence=True)
        if sync_start:
            self.zk.create(self.path("sync"), b"sync")

    def attach_queue(self, timer):
        if not self.zk.exists(self.root):
            raise ValueError("the root does not exist")
        self.timer = timer

    def wait_sync(self, seconds):
        end = time.time() + seconds
        while self.zk.exists(self.path("sync")):
            if time.time() > end:
                return False
            time.sleep(0.05)
        return True

    def queue_count(self):
        return len(self.names("queue-"))

    def get_timers(self, expired_only):
        ages = {}
        for name in self.names("timer-"):
            try:
                data, stat = self.zk.get(self.path(name))
            except NoNodeError:
                continue
            age = time.time() - stat.mtime / 1000
            if age > self.timer or not expired_only:
                ages[data[:1023].decode()] = age
        return ages

    def check_timers(self):
        return [len(self.names("timer-")), len(self.get_timers(True))]

    def clear_timers(self):
        for name in self.names():
            self.zk.delete(self.path(name))
        self.zk.delete(self.root)

    # A child's calls.

    def create_timer(self, process):
        self.process = process.encode()
        self.own = self.zk.create(self.path("timer-"), self.process, ephemeral=True, sequence=True)
        try:
            self.zk.delete(self.path("sync"))
        except NoNodeError:
            pass

    def kick_dog(self):
        try:
            self.zk.set(self.own, self.process)
            return True
        except NoNodeError:
            return False

    def consume(self):
        for name in sorted(self.names("queue-")):
            try:
                data, _ = self.zk.get(self.path(name))
                self.zk.delete(self.path(name))
                return data[:1023].decode()
            except NoNodeError:
                continue
        return None

    # Both.

    def check_exists(self, path):
        return self.zk.exists(path) is not None

    def fetch_node(self, path):
        return self.zk.get(path)[0][:1023].decode()


def main():
    peer = Peer(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"is": getattr(peer, name)(*arguments)}
        except Exception as error:
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)
    peer.zk.stop()


main()
