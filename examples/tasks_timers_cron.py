"""What runs by the clock: a task, a timer, and cron jobs in three time zones.

streamd -A examples/tasks_timers_cron.py worker -l info
streamd -A examples/tasks_timers_cron.py cron
"""

from zoneinfo import ZoneInfo

import pytz

import streamd

app = streamd.App("by-the-clock")


@app.task
async def on_started():
    """Once, as soon as the app is fully operational."""
    print("APP STARTED")


@app.timer(interval=1.0)
async def every_second():
    """Every second from then on; a timer of 60.0 would be every minute."""
    print("WAKE UP")


@app.crontab("0 20 * * *")
async def every_day_at_8_pm():
    """Without a time zone, times are UTC."""
    print("WAKE UP ONCE A DAY")


@app.crontab("0 20 * * *", tz=pytz.timezone("US/Pacific"), on_leader=True)
async def every_day_at_8_pm_pacific():
    """A zone of pytz; on_leader: in one process of the whole app, on however many hosts."""
    print("WAKE UP ONCE A DAY, IN CALIFORNIA")


@app.crontab("30 2 * * *", tz=ZoneInfo("Europe/Vienna"))
async def every_night_in_vienna():
    """A zone of the standard library. In spring there is a night without a 2:30, and in autumn
    one with two: this runs once in each."""
    print("WAKE UP ONCE A NIGHT")
