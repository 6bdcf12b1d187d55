# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hosts, their VMs and the faults between them, for the tests, the bench and the demo."""
