"""The first lines of KuaiRand's files, for logs that tests write."""

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
VIDEOS = "video_id,author_id,video_type,upload_dt,video_duration,music_id,tag"
USERS = (
    "user_id,user_active_degree,register_days_range,follow_user_num_range,fans_user_num_range,friend_user_num_range,"
    "is_video_author,onehot_feat0,onehot_feat1"
)
T0 = 1_650_812_741_436
"""A moment of the log, ms."""
